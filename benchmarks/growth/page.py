"""How are the results of benchmarks.growth written? As tables, as figures, and as a part of docs/analyzers.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.growth import operations
from benchmarks.shared import tables as layout
from benchmarks.shared.tables import Table

PACKAGES = ("torch", "numpy", "hyper-connections", "depthscope")
LABELS = {"depth": "layers", "width": "features", "tokens": "tokens in a sequence", "streams": "streams"}
LAST = 3  # points to which an exponent is fitted: fixed costs dominate the smaller sizes


def slope(values: list[float], costs: list[float]) -> float:
    """The exponent over the last points, by least squares in logarithms."""
    # cost = a size^p is a line of slope p in logarithms.
    return float(np.polyfit(np.log(values[-LAST:]), np.log(costs[-LAST:]), 1)[0])


def exponents(points: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Group to the exponent that was measured and the one that its operations give, over the same points."""
    values = [point["value"] for point in points]
    return {
        group: (
            slope(values, [point["seconds"][group] for point in points]),
            slope(values, [point["operations"][group] for point in points]),
        )
        for group in points[0]["operations"]
    }


def tables(results: dict[str, Any]) -> list[Table]:
    """Exponents, then milliseconds at the base."""
    found = {factor: exponents(points) for factor, points in results["factors"].items()}
    groups = list(next(iter(found.values())))
    rows = [
        [group, *(f"{found[factor][group][0]:.1f} ({found[factor][group][1]:.1f})" for factor in found)]
        for group in groups
    ]
    return [
        ("Exponents: measured (expected)", ["", *found], rows),
        *(milliseconds(factor, points) for factor, points in results["factors"].items()),
    ]


def milliseconds(factor: str, points: list[dict[str, Any]]) -> Table:
    rows = [
        [group, *(f"{1e3 * point['seconds'][group]:.3g}" for point in points)]
        for group in points[0]["seconds"]
    ]
    return (
        f"Milliseconds, by the number of {LABELS[factor]}",
        ["", *(str(point["value"]) for point in points)],
        rows,
    )


def text(results: dict[str, Any]) -> str:
    """Tables for a terminal."""
    return f"{results['machine']}; medians of {results['rounds']} rounds\n\n{layout.as_text(tables(results))}"


def markdown(results: dict[str, Any]) -> str:
    """This benchmark's part of docs/analyzers.md."""
    # The exponents go first: the times are of one machine.
    fixed, *taken = tables(results)
    parts = [HEAD.format(**results), layout.as_markdown(fixed)]
    parts += [
        f"![Cost against the number of {LABELS[factor]}](images/cost-{factor}.svg)\n" for factor in LABELS
    ]
    reasons = REASONS.format(passes=operations.PASSES, small=operations.SMALL)
    parts += [reasons, *map(layout.as_markdown, taken), layout.named(results["versions"]), ""]
    return "\n".join(parts)


def draw(results: dict[str, Any], folder: Path) -> None:
    """One figure for each factor: seconds of each group, in dashes the slope that its operations give.

    ``results``: of a run.
    ``folder``: where ``cost-*.svg`` go.
    """
    from depthscope.app.drawing.matplotlib.style import figure_style

    folder.mkdir(parents=True, exist_ok=True)
    for factor, points in results["factors"].items():
        with figure_style("icml") as size:
            canvas = drawn(LABELS[factor], points, size.inches)
            # Without the date: a figure changes only with its numbers.
            canvas.savefig(folder / f"cost-{factor}.svg", metadata={"Date": None})


def drawn(label: str, points: list[dict[str, Any]], inches: float) -> Any:
    # Figure, not pyplot: no backend, no global state.
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    from depthscope.app.drawing.matplotlib.curves import MARKERS
    from depthscope.app.figures.palette import RUN_COLOURS

    canvas = Figure(figsize=(inches, 0.8 * inches), layout="constrained")
    axes = canvas.add_subplot(xscale="log", yscale="log", xlabel=label, ylabel="seconds")
    values = [point["value"] for point in points]
    for group, colour, marker in zip(points[0]["operations"], RUN_COLOURS, MARKERS.values(), strict=False):
        taken = [point["seconds"][group] for point in points]
        # The expected slope, moved to the last measured point.
        counted = np.array([point["operations"][group] for point in points])
        axes.plot(values, taken, color=colour, marker=marker, label=group)
        axes.plot(
            values, counted / counted[-1] * taken[-1], color=colour, linestyle=(0, (4, 2)), linewidth=0.6
        )
    # Log axes label powers of ten; sizes are powers of two.
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values, [str(value) for value in values])
    canvas.legend(loc="outside lower center", ncols=3)
    return canvas


HEAD = """## What an analysis costs, and how it grows

Written by `{command}` on {date}; {machine}. Not edited by hand.

An mHC decoder is trained for a step with gradients and captured; then the run is analysed by one group of metrics at a time.
One factor is varied at a time, around {base[layers]} layers (two connections and two states each), {base[width]} features,
{base[batch]} × {base[tokens]} tokens and {base[streams]} streams. *Capture* is what the captured step, its run built, takes
beyond the plain one. Times are medians of {rounds} rounds (one where it takes more than a second), of the processor, one
thread. An exponent is the slope in logarithms over the last three points; the expected one, in brackets, is that of the
operations counted at the same points, and dashed in the figures.
"""

REASONS = """**Why.** With N tokens in all, D features, S states, n streams and C connections:

* *Capture* copies each state and adds up its statistics: S N n D.
* *Ranks* need the eigenvalues of the smaller Gram matrix of every state, of its mean over streams and of each stream, for
  each sequence and for all tokens: (n + 1) S times m² M + 4 m³, where m and M are the smaller and the larger of tokens and
  features.
* *Geometry* looks for each token's nearest two: (n + 1) S N² D.
* *Similarity* multiplies Gram matrices, S N² D, or cross-covariances, S² N D², whichever is less; angles cost S² N D, and
  streams are compared among themselves.
* *Mixing* multiplies small matrices between any two connections, C² N n², and decomposes each, C N n³.
* *Gradients* have a spectrum for each sequence.

All but the first and mixing also pass over the states some times, (n + 1) S N D numbers, which is counted as {passes}
multiplications each; decomposing a small matrix is counted as {small} products.

Where the measured exponent is below the expected one, costs that do not grow still weigh: reading the run, labelling the
results, starting many small products. What is asked for by name alone is computed alone: `analyze(run, metrics=[...])`.
"""
