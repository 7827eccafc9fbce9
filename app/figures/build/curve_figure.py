"""How does a number, or a spectrum, change across depth, connections or modules? Runs overlaid, with nulls and bands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from depthscope.app.figures.build.matrix_figure import MatrixFigure
from depthscope.app.figures.build.measurement import Curve, Measurement, describe_lines, remarks_by_run
from depthscope.app.figures.build.values import LABELLED, defined_labels, names_of, streams_of
from depthscope.app.figures.specification import (
    Analyses,
    Array,
    FigureKind,
    Line,
    Lines,
    Selection,
    null_label,
)
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.metrics.declaration import Metric
from depthscope.diagnostics.verdicts import VERDICTS, Limits, Severity, last_step
from depthscope.diagnostics.verdicts.declaration import exact

_AXES = {
    ("depth", "depth"): "depth (0 = embedding)",
    ("depth", "relative"): "relative depth (0 = embedding, 1 = last state)",
    ("connection", "depth"): "connection (0 = first sublayer)",
    ("connection", "relative"): "relative position (0 = first, 1 = last connection)",
    ("weight", "depth"): "module, in the order of the model",
    ("weight", "relative"): "relative position (0 = first, 1 = last module)",
    ("component", "depth"): "order (0 = largest)",
    ("component", "relative"): "relative order (0 = largest, 1 = least)",
}
# Labels of the analysis that people write with a sign.
_SIGNS = {"infinity": "∞-norm", "one": "1-norm", "two": "2-norm"}


def axis_title(dim: str, axis: str) -> str:
    """Title of the axis along a dimension."""
    # A dimension without a title here, such as that of a new metric, goes by its name.
    return _AXES.get((dim, axis), dim.replace("_", " "))


@dataclass(frozen=True)
class CurveFigure(FigureKind):
    """A figure of one metric along its axis; the axis and its scale are those of the metric's declaration.

    ``y_label``: Vertical axis.
    ``over``: Dimension with a line for each label: "direction", "stream", or one that is not selected, such as
    "component".
    ``thresholds``: Values drawn as dotted lines, with their labels, in addition to the limits of the verdicts that
    judge the metric.
    ``scope``: Tokens that a metric without scopes is taken from: those of all "data" or of a "sequence".
    ``around``: Metric with the band: along ``quantile``, or as ± of the value.
    ``note``: Sentence that ends the remarks of the caption.
    ``derive``: Takes an analysis and returns one in which the metric is what is drawn.
    """

    y_label: str
    over: str = ""
    thresholds: tuple[tuple[float, str], ...] = ()
    scope: str = "data"
    around: str = ""
    note: str = ""
    derive: Callable[[xr.Dataset], xr.Dataset] | None = None

    @property
    def also(self) -> tuple[str, ...]:
        """Further variables that it draws where the analysis has them."""
        return (self.around,) if self.around else ()

    @property
    def uses(self) -> tuple[str, ...]:
        """The selected labels among the dims of the metric, the axis and the step."""
        dims = CATALOGUE[self.metric].dims
        # All streams are drawn where `over` is "stream"; of the directions one may still be chosen.
        chosen = [dim for dim in LABELLED if dim in dims and (dim != self.over or dim == "direction")]
        return (*chosen, "axis", "step")

    def figure(self, analyses: Analyses, choice: Selection) -> Lines:
        """The curves of every run that has the metric."""
        if self.derive is not None:
            # Before anything is selected: a derived variable is picked, labelled and captioned as a measured one.
            analyses = {run: self.derive(data) for run, data in analyses.items()}
        measurement = Measurement(self.metric, analyses, choice)
        curves = list(self._measured(measurement))
        runs = list(analyses)
        # By run, and `sorted` is stable: a null takes the colour of the measured line before it.
        ordered = sorted(curves, key=lambda curve: runs.index(curve.line.group))
        lines = _without_repeated_nulls([line for curve in ordered for line in curve.lines])
        # The scale is declared, not chosen by the data: an axis that changes with the run cannot be compared.
        declared = CATALOGUE[self.metric]
        judged = {} if self.derive else judged_limits(self.metric, analyses)
        # A band is for all runs of the figure, or none.
        everywhere = all(name in judged for name, each in analyses.items() if self.metric in each)
        healthy = passing_range(judged) if everywhere else None
        remarks = remarks_by_run(
            ((curve.line.group, remark) for curve in curves for remark in curve.remarks),
            {curve.line.group for curve in curves},
        )
        return Lines(
            name=self.name,
            title=self.title,
            x_label=axis_title(declared.axis, choice.axis),
            y_label=measurement.axis_label(self.y_label),
            lines=(*lines, *_threshold_lines(lines, [*self.thresholds, *limit_labels(judged)])),
            log_y=declared.scale == "log",
            healthy=healthy,
            caption=measurement.caption(
                lines,
                # Weights are not measured on tokens: there is nothing to count.
                scope="" if declared.axis == "weight" else self.scope,
                remarks=[*remarks, "Green: within the limits of the verdicts." if healthy else "", self.note],
            ),
            alt=describe_lines(lines, self.title, declared.axis),
            metric=self.metric,
            # Of a null that is not drawn the source would be cited for nothing.
            sources=(declared.null_cite,)
            if declared.null_cite and any(line.role == "null" for line in lines)
            else (),
        )

    def _measured(self, measurement: Measurement) -> Iterator[Curve]:
        axis = CATALOGUE[self.metric].axis
        for label, fixed in self._variants(measurement):
            for run, _, values in measurement.slices(**fixed):
                for name, curve in self._split(values, label):
                    yield measurement.curve(run, curve, axis=axis, label=name, around=self.around, **fixed)

    def _variants(self, measurement: Measurement) -> list[tuple[str, dict[str, str]]]:
        """Labels of the selection that are overlaid, as (label of the line, labels to fix)."""
        choice = measurement.choice
        if self.over == "direction":
            chosen = ("forward", "backward") if choice.direction == "both" else (choice.direction,)
            return [(direction, {"direction": direction}) for direction in chosen]
        if "stream" in measurement.dims:
            # Shares of the streams have no mean: without one every stream is drawn, whatever the selection.
            has_mean = "mean" in defined_labels(measurement.variable, "stream")
            if self.over == "stream" or choice.stream == "each" or not has_mean:
                streams = [stream for stream in streams_of(measurement.analyses) if stream != "mean"]
                return [(f"stream {stream}", {"stream": stream}) for stream in streams]
        return [("", {})]

    def _split(self, values: xr.DataArray, label: str) -> list[tuple[str, xr.DataArray]]:
        """One-dimensional curves of a slice: itself, or one for each label of a dimension that is not selected."""
        # Directions and streams are selected by `_variants` and are no dimension of the slice any more.
        if self.over not in values.dims:
            return [(label, values)]
        names = [str(name) for name in values[self.over].values]
        if self.over == "component":
            names = [f"σ{i + 1}" for i in range(len(names))]
        return [(_SIGNS.get(name, name), values.isel({self.over: i})) for i, name in enumerate(names)]


def _threshold_lines(lines: Sequence[Line], labelled: Sequence[tuple[float, str]]) -> list[Line]:
    ends = [end for line in lines for end in (line.x.min(initial=0.0), line.x.max(initial=0.0))]
    # Without a curve a threshold still needs two ends.
    span = np.array([min(ends, default=0.0), max(ends, default=1.0)])
    return [Line(span, np.full(2, value), label, role="threshold") for value, label in labelled]


def _without_repeated_nulls(lines: Sequence[Line]) -> list[Line]:
    """Lines with every null of a run once: its four streams share one expectation."""
    distinct: list[Line] = []
    for line in lines:
        nulls = [other for other in distinct if other.role == "null" and other.group == line.group]
        if line.role != "null" or not any(np.array_equal(line.y, o.y, equal_nan=True) for o in nulls):
            distinct.append(line)
    return distinct


_WORDS = {Severity.INFO: "note", Severity.WARN: "warn", Severity.FAIL: "fail"}


def judged_limits(metric: str, analyses: Analyses) -> dict[str, frozenset[Limits]]:
    """The limits of every run that is judged by its values of a metric."""
    found = {}
    for run, analysis in analyses.items():
        last = last_step(analysis)
        limits = frozenset(each for verdict in VERDICTS.values() for each in verdict.limits_on(metric, last))
        if limits:
            found[run] = limits
    return found


def limit_labels(judged: dict[str, frozenset[Limits]]) -> list[tuple[float, str]]:
    """Every limit with its label, such as ``warn: 10``, once."""
    levels = {
        (value, f"{_WORDS[severity]}: {exact(value)}")
        for limits in judged.values()
        for each in limits
        for severity, value in each.levels
    }
    return sorted(levels)


def passing_range(judged: dict[str, frozenset[Limits]]) -> tuple[float, float] | None:
    """The values that no verdict reports, ±inf where it is open."""
    if len(set(judged.values())) != 1:
        return None
    (limits,) = set(judged.values())
    ends = [(each.levels[0][1], each.above) for each in limits]
    low = max((value for value, above in ends if not above), default=-np.inf)
    high = min((value for value, above in ends if above), default=np.inf)
    return (low, high) if low < high else None


# Dimensions with so few labels that each is a line; any other one is the second axis of a heat map.
_LINES = ("direction", "kind", "norm", "component", "quantile")


def default_figures(metrics: Sequence[Metric], defined: Sequence[FigureKind]) -> list[FigureKind]:
    """A figure for each of some metrics that one can be made for, with the questions of those that are defined."""
    # Called when the app is imported: a metric that no default figure can draw must not stop the command line.
    # tests/rules/test_registered_figures.py fails for it, with the advice of `default_figure`.
    return [
        default_figure(metric, _question(metric, defined)) for metric in metrics if not undrawn_dims(metric)
    ]


def undrawn_dims(metric: Metric) -> list[str]:
    """Dimensions of a metric that no default figure shows at once; empty where one can be made."""
    others = _further_dims(metric)
    # Curves spend their one dimension on the directions; a heat map is of one direction, see `MatrixFigure.figure`.
    only_lines = set(others) <= set(_LINES)
    at_once = others if only_lines else [dim for dim in others if dim != "direction"]
    return others if len(at_once) > 1 else []


def default_figure(metric: Metric, question: str) -> FigureKind:
    """The figure that a declaration gives: a heat map of a matrix, curves of anything else."""
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
            metric.name, metric.title, metric.label, rows=metric.axis, columns=across[0], question=question
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


NUM_DEPTHS = 5  # each has a null: ten lines in one figure. A heuristic of ours.
NOISE_WORDS = "Dashed: the Marchenko-Pastur law, independent noise of the same shape and energy."


@dataclass(frozen=True)
class SpectrumFigure(FigureKind):
    """A figure of the singular values of the states at some depths, with those of noise of the same energy."""

    @property
    def uses(self) -> tuple[str, ...]:
        """The selected labels among the dims of the metric, the depths and the step."""
        dims = CATALOGUE[self.metric].dims
        return (*(dim for dim in LABELLED if dim in dims), "depths", "step")

    def figure(self, analyses: Analyses, choice: Selection) -> Lines:
        """The spectra of every run that has them, at the chosen depths."""
        measurement = Measurement(self.metric, analyses, choice)
        curves = [
            _of_depth(measurement, run, values.isel(depth=depth), names_of(values, "depth")[depth])
            for run, _, values in measurement.slices()
            for depth in _depths(values.sizes["depth"], choice)
        ]
        lines = [line for curve in curves for line in curve.lines]
        several = any(data.sizes.get("stream", 1) > 1 for data in analyses.values())
        noise = any(curve.null is not None for curve in curves)
        runs = {curve.line.group for curve in curves}
        remarks = [
            "Of the mean over streams." if several else "",
            *remarks_by_run(((curve.line.group, each) for curve in curves for each in curve.remarks), runs),
            NOISE_WORDS if noise else "",
            "Not drawn below the rounding of float32.",
        ]
        return Lines(
            name=self.name,
            title=self.title,
            x_label="order (1 = largest)",
            y_label=measurement.axis_label("singular value"),
            lines=tuple(lines),
            # A power law is a straight line on two logarithmic axes.
            log_y=True,
            log_x=True,
            caption=measurement.caption(
                [curve.line for curve in curves], scope=choice.scope, remarks=remarks
            ),
            alt=describe_lines(lines, self.title, "order"),
            metric=self.metric,
            sources=("marchenko1967distribution",) if noise else (),
        )


def _of_depth(measurement: Measurement, run: str, values: xr.DataArray, name: str) -> Curve:
    """The measured spectrum of a depth, and that of noise, at the orders that the states can have."""
    label = f"depth {int(values['depth'])}"
    curve = measurement.curve(run, values, axis="order", label=label)
    line, null = curve.line, curve.null
    # All depths share the labels of `order`; beyond those that the states of this one can have they are NaN.
    kept = np.isfinite(line.y) | (np.isfinite(null.y) if null is not None else False)
    orders, sigma = line.x[kept], line.y[kept]
    floor = _rounding(sigma, orders)
    lower, upper = (None if part is None else part[kept] for part in (line.lower, line.upper))
    shown = f"{run} · {label}" if len(measurement.analyses) > 1 else label
    line = replace(
        line,
        x=orders,
        # On a log axis rounding noise would look like a cliff at the end of the spectrum.
        y=np.where(sigma > floor, sigma, np.nan),
        # A band that reaches zero or below cannot be drawn on a log axis.
        lower=None if lower is None else np.maximum(lower, floor),
        upper=upper,
        label=shown,
        text=[name] * len(orders),
    )
    if null is not None:
        null = replace(null, x=orders, y=null.y[kept], label=null_label(shown))
    return Curve(line, null, curve.remarks)


def _depths(size: int, choice: Selection) -> list[int]:
    """The depths that were chosen and exist, or some from the first to the last."""
    if choice.depths:
        # A depth that a shallower run lacks is left out of its lines, not refused for all runs.
        return [depth for depth in choice.depths if 0 <= depth < size]
    # A set: of fewer depths than `NUM_DEPTHS` several positions round to the same one.
    return sorted({round(position) for position in np.linspace(0, size - 1, NUM_DEPTHS)})


def _rounding(sigma: Array, orders: Array) -> float:
    """The largest singular value that is not distinguishable from zero.

    States are float32: a matrix of rank r is known up to about r · eps · σ₁, the threshold of `numpy.linalg.matrix_rank`
    too.
    """
    known = np.isfinite(sigma)
    if not known.any():
        return 0.0
    return float(np.finfo(np.float32).eps * orders[known].max() * sigma[known].max())
