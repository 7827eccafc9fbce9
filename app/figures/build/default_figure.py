"""Which figure does a metric get that no figure names? One made from its declaration."""

from __future__ import annotations

from collections.abc import Sequence

from depthscope.app.figures.build.curve_figure import CurveFigure
from depthscope.app.figures.build.matrix_figure import MatrixFigure
from depthscope.app.figures.build.values import LABELLED
from depthscope.app.figures.specification import FigureKind
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.metrics.declaration import Metric

# Dimensions with so few labels that each is a line; any other one is the second axis of a heat map.
_LINES = ("direction", "kind", "norm", "component", "quantile")


def default_figures(metrics: Sequence[Metric], defined: Sequence[FigureKind]) -> list[FigureKind]:
    """A figure for each of some metrics that one can be made for.

    ``defined``: figures of the catalogue, whose questions are used.
    """
    # Called when the app is imported: a metric that no default figure can draw must not stop the command line.
    # tests/rules/test_registered_figures.py fails for it, with the advice of `default_figure`.
    return [
        default_figure(metric, _question(metric, defined)) for metric in metrics if not undrawn_dims(metric)
    ]


def undrawn_dims(metric: Metric) -> list[str]:
    """Dimensions of a metric that no default figure shows at once; empty where one can be made.

    Returns: Those besides the axis of which no label is selected.
    """
    others = _further_dims(metric)
    # Curves spend their one dimension on the directions; a heat map is of one direction, see `MatrixFigure.figure`.
    only_lines = set(others) <= set(_LINES)
    at_once = others if only_lines else [dim for dim in others if dim != "direction"]
    return others if len(at_once) > 1 else []


def default_figure(metric: Metric, question: str) -> FigureKind:
    """The figure that a declaration gives: a heat map of a matrix, curves of anything else.

    Raises InputError: For a metric with more dimensions than a figure has axes.
    """
    if undrawn := undrawn_dims(metric):
        raise InputError(
            f"{metric.name} has the dims {', '.join(metric.dims)}: no default figure shows {' and '.join(undrawn)} at once; "
            "define one in app/figures/catalogue.py"
        )
    others = _further_dims(metric)
    across = [dim for dim in others if dim not in _LINES]
    # Both orders of a matrix are right; the axis itself goes up, as in the figures of the catalogue.
    if across:
        return MatrixFigure(
            metric.name,
            metric.title,
            metric.label,
            rows=metric.axis,
            columns=across[0],
            question=question,
        )
    over = others[0] if others else ""
    return CurveFigure(metric.name, metric.title, metric.label, over=over, question=question)


def _further_dims(metric: Metric) -> list[str]:
    """Dimensions besides the axis that a figure has to show."""
    # A selection takes one label of each of these, but draws both directions as lines.
    return [dim for dim in metric.dims if dim != metric.axis and (dim not in LABELLED or dim == "direction")]


def _question(metric: Metric, defined: Sequence[FigureKind]) -> str:
    """That of the figures of the same module, else by what the metric is computed from."""
    siblings = [kind for kind in defined if CATALOGUE[kind.metric].question == metric.question]
    if siblings:
        return siblings[-1].question
    # h_res, h_pre and h_post are the parts of a connection.
    if any(root.startswith("h_") for root in metric.roots):
        return "mixing"
    if any("gradient" in root or "weight" in root for root in metric.roots):
        return "gradients"
    return "similarity" if metric.pairwise else "collapse"
