"""How are curves drawn on paper? Colour by run, dashes by variant, nulls dashed, limits in grey."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from depthscope.app.drawing.matplotlib.style import are_whole, inches_of, num_letters, plain, plain_ticks
from depthscope.app.figures.build.bins import visible_limits
from depthscope.app.figures.palette import MARK_EDGE, SHAPES, Look
from depthscope.app.figures.specification import Line, Lines

MARKERS = dict(zip(SHAPES, ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">"), strict=True))
DASHES: tuple[Any, ...] = ("-", (0, (6, 1.2, 1.2, 1.2)), (0, (3, 1)), (0, (1, 0.8)))
HEALTHY = "#E4F2E7"
NULL: dict[str, Any] = {"linestyle": (0, (4, 2)), "linewidth": 0.8}
MARK: dict[str, Any] = {"linestyle": "", "marker": "v", "markersize": 5, "markeredgecolor": "black"}
# Bands whose colours may add up; more of them are paler, so that curves are seen through all.
FULL_BANDS = 4


def keywords_of(look: Look) -> dict[str, Any]:
    """How a measured line is drawn."""
    return {
        "color": look.colour,
        "linestyle": DASHES[look.variant % len(DASHES)],
        "marker": MARKERS[look.shape],
        "markerfacecolor": "white" if look.hollow else look.colour,
        "markeredgecolor": MARK_EDGE,
        "markeredgewidth": 0.5,
    }


def plot_lines(axes: Axes, figure: Lines, looks: Mapping[int, Look]) -> None:
    """Draw curves into axes, with their limits; labels and legend are left to the caller.

    ``looks``: by the ``id`` of each measured line.
    """
    measured = [line for line in figure.lines if line.role == "measured"]
    # On a log axis without a positive value matplotlib warns and draws nothing.
    if figure.log_y and any(bool(np.any(line.y > 0)) for line in measured):
        axes.set_yscale("log", nonpositive="mask")
    if figure.log_x:
        axes.set_xscale("log", nonpositive="mask")
    colour = "0.4"
    bands = sum(line.lower is not None for line in figure.lines)
    for line in figure.lines:
        # Nulls and marks have the colour of the measured line before them.
        colour = looks[id(line)].colour if id(line) in looks else colour
        if line.role == "measured":
            opacity = 0.18 * min(1.0, FULL_BANDS / max(bands, 1))
            _draw_measured(axes, line, keywords_of(looks[id(line)]), opacity)
        elif line.role == "mark":
            axes.plot(line.x, line.y, color=colour, zorder=4, **MARK)
        elif line.role == "null":
            axes.plot(line.x, line.y, color=colour, alpha=0.8, **NULL)
    # Before the limits are drawn: a threshold that is far off must not flatten the curves.
    _limit(axes, figure)
    _draw_limits(axes, figure)


def _draw_measured(axes: Axes, line: Line, look: Mapping[str, Any], opacity: float) -> None:
    thinned = max(1, math.ceil(len(line.x) / 12))  # about twelve markers, however deep the model
    # A logarithmic axis shows nothing of a line of zeros; its legend entry must explain that.
    hidden = axes.get_yscale() == "log" and not np.any(line.y > 0)
    label = plain(line.label) + (" (never above 0)" if hidden else "")
    axes.plot(line.x, line.y, label=label, markevery=thinned, zorder=3, **look)
    if line.lower is not None and line.upper is not None and not hidden:
        axes.fill_between(
            line.x, line.lower, line.upper, color=look["color"], alpha=opacity, linewidth=0, zorder=2
        )
    if line.error is not None:
        axes.errorbar(line.x, line.y, line.error, fmt="none", ecolor=look["color"], elinewidth=0.6, zorder=2)


def _limit(axes: Axes, figure: Lines) -> None:
    """Limits from the measured values, not from distant thresholds; ticks as plain as possible."""
    # Depths are counted: there is no depth 2.5.
    if not figure.log_x and all(are_whole(line.x) for line in figure.lines):
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.margins(x=0.02)
    axes.autoscale_view()
    lines = [line for line in figure.lines if line.role in ("measured", "null")]
    parts = [part for line in lines for part in (line.y, line.lower, line.upper) if part is not None]
    values = np.concatenate(parts) if parts else np.zeros(0)
    values = values[np.isfinite(values)]
    if values.size:
        low, high = float(values.min()), float(values.max())
        if visible_limits(low, high) != (low, high):  # they differ by rounding alone
            axes.set_ylim(*visible_limits(low, high))
    # Measured before the loop: otherwise one threshold could bring the next one near.
    low, high = axes.get_ylim()
    is_log = axes.get_yscale() == "log"
    for line in figure.lines:
        if line.role == "threshold" and _is_near(line.y[0], low, high, is_log):
            axes.set_ylim(*_including(line.y[0], *axes.get_ylim(), is_log))
    if figure.limits is not None:
        axes.set_ylim(*figure.limits)
    if is_log:
        plain_ticks(axes.yaxis, *axes.get_ylim())


def _is_near(value: float, low: float, high: float, is_log: bool) -> bool:
    """Whether a threshold is at most a decade, or half the span, away: near enough to be shown. A heuristic of ours."""
    if is_log:
        return value > 0 and low / 10 <= value <= high * 10
    return low - (high - low) / 2 <= value <= high + (high - low) / 2


def _including(value: float, low: float, high: float, is_log: bool) -> tuple[float, float]:
    """The limits of the axis, widened so that a value is a little inside."""
    if is_log:
        return min(low, value / 1.15), max(high, value * 1.15)
    room = 0.03 * (high - low)
    return min(low, value - room), max(high, value + room)


def _draw_limits(axes: Axes, figure: Lines) -> None:
    """Thresholds with their names and the healthy band, as far as they are in view; they never move the axes."""
    low, high = axes.get_ylim()
    inches = inches_of(axes)
    words = (
        1.5 * mpl.rcParams["font.size"] / 72 / max(inches[1], 0.5)
    )  # the share of the height that they take
    named: list[float] = []
    for line in figure.lines:
        if line.role != "threshold" or not low <= line.y[0] <= high:
            continue
        axes.plot(line.x, line.y, color="0.35", linestyle=":", linewidth=0.9, zorder=1)
        height = axes.transAxes.inverted().transform(axes.transData.transform((line.x[-1], line.y[0])))[1]
        # Above the axes are other words, such as a title.
        is_above = height + words <= 1
        middle = height + (words if is_above else -words) / 2
        if all(abs(at - middle) > words for at in named):
            named.append(middle)
            _name_threshold(axes, line, is_above=is_above, letters=num_letters(0.9 * inches[0]))
    if figure.healthy is not None:
        bottom, top = max(low, figure.healthy[0]), min(high, figure.healthy[1])
        if bottom < top:
            axes.axhspan(bottom, top, color=HEALTHY, linewidth=0, zorder=0, label="healthy")
    axes.set_ylim(low, high)


def _name_threshold(axes: Axes, line: Line, *, is_above: bool, letters: int) -> None:
    axes.annotate(
        plain(line.label, longest=letters),
        (1, line.y[0]),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 1.5 if is_above else -1.5),
        textcoords="offset points",
        ha="right",
        va="bottom" if is_above else "top",
        color="0.35",
        fontsize=mpl.rcParams["xtick.labelsize"],
        # Read also where a curve passes behind it.
        bbox={"facecolor": mpl.rcParams["axes.facecolor"], "alpha": 0.7, "linewidth": 0, "pad": 0.5},
    )


def variant_of(line: Line) -> str:
    """What distinguishes a line from others of its run.

    Returns: Empty for the plain line of a run.
    """
    return line.label.removeprefix(line.group).removeprefix(" · ")


def measured_of(contents: Sequence[Any]) -> list[Line]:
    """The measured lines of some panels."""
    return [
        line
        for content in contents
        if isinstance(content, Lines)
        for line in content.lines
        if line.role == "measured"
    ]
