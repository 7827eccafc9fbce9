"""How are curves drawn on paper? Colour by run, dashes by variant, nulls dashed, limits in grey."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from depthscope.app.drawing.matplotlib.paper_figure import PaperFigure, fits_inside, named_apart, num_columns
from depthscope.app.drawing.matplotlib.style import (
    Width,
    are_whole,
    fit_labels,
    inches_of,
    label_axes,
    plain,
    plain_ticks,
)
from depthscope.app.figures.line_looks import looks_of, visible_limits
from depthscope.app.figures.palette import MARK_EDGE, SHAPES, Look
from depthscope.app.figures.specification import NOISE_BASELINE, Line, Lines

MARKERS = dict(zip(SHAPES, ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">"), strict=True))
DASHES: tuple[Any, ...] = ("-", (0, (6, 1.2, 1.2, 1.2)), (0, (3, 1)), (0, (1, 0.8)))
HEALTHY = "#E4F2E7"
NULL: dict[str, Any] = {"linestyle": (0, (4, 2)), "linewidth": 0.8}
MARK: dict[str, Any] = {"linestyle": "", "marker": "v", "markersize": 5, "markeredgecolor": "black"}
# Bands whose colours may add up; more of them are paler, so that curves are seen through all.
FULL_BANDS = 4


def draw_lines(figure: Lines, size: Width) -> Canvas:
    """Draw curves with their bands, nulls, thresholds and healthy range.

    ``size``: inches across and type size; `figure_style` must be active.
    """
    measured = [line for line in figure.lines if line.role == "measured"]
    looks = {line: keywords_of(look) for line, look in looks_of(figure).items()}
    named = list(named_apart(measured, looks))
    names = [name for _, name in named] or [line.label for line in measured]
    canvas = PaperFigure(size, (size.inches, _height(size, figure, [*names, *_others(figure)])))
    axes = canvas.add_subplot()
    plot_lines(axes, figure, looks)
    labels = label_axes(axes, figure.x_label, figure.y_label, (size.inches, 0.7 * _axes_height(size)))
    _legend(canvas, axes, figure, size, named)
    fit_labels(canvas, labels)
    return canvas


def plot_lines(axes: Axes, figure: Lines, looks: Mapping[int, Mapping[str, Any]]) -> None:
    """Draw curves into axes, with their limits; labels and legend are left to the caller.

    ``looks``: by the ``id`` of each measured line: the keywords that draw it, see `keywords_of`.
    """
    measured = [line for line in figure.lines if line.role == "measured"]
    # On a log axis without a positive value matplotlib warns and draws nothing.
    if figure.log_y and any(bool(np.any(line.y > 0)) for line in measured):
        axes.set_yscale("log", nonpositive="mask")
    if figure.log_x:
        axes.set_xscale("log", nonpositive="mask")
    # The limits are set between the two: a threshold that is far off must not flatten the curves.
    _draw_roles(axes, figure, looks, ("measured", "null", "mark"))
    _limit(axes, figure)
    _draw_limits(axes, figure)


def _others(figure: Lines) -> list[str]:
    """What the legend may list besides measured lines; which thresholds it names is known after the size is set."""
    return sorted({line.role for line in figure.lines if line.role != "measured"})


def _is_inside(figure: Lines, entries: Sequence[str]) -> bool:
    """Whether the legend goes into the axes, where it would cover the name of a threshold."""
    return fits_inside(entries) and not any(line.role == "threshold" for line in figure.lines)


def _height(size: Width, figure: Lines, entries: Sequence[str]) -> float:
    below = 0 if _is_inside(figure, entries) else math.ceil(len(entries) / num_columns(entries, size))
    return _axes_height(size) + below * 1.45 * size.points / 72


def _axes_height(size: Width) -> float:
    # Near the golden ratio in one column; flatter across the page, where it would take half of it.
    return 0.62 * size.inches if size.inches < 4 else 0.45 * size.inches


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


def _draw_roles(
    axes: Axes, figure: Lines, looks: Mapping[int, Mapping[str, Any]], roles: Sequence[str]
) -> None:
    """The lines of some roles; nulls take the colour of the measured line before them."""
    colour = "0.4"
    bands = sum(line.lower is not None for line in figure.lines)
    opacity = 0.18 * min(1.0, FULL_BANDS / max(bands, 1))
    for line in figure.lines:
        of_line = looks.get(id(line), {})
        colour = of_line.get("color", colour)
        if line.role not in roles:
            continue
        if line.role == "measured":
            _draw_measured(axes, line, of_line, opacity)
        elif line.role == "mark":
            axes.plot(line.x, line.y, color=colour, zorder=4, **MARK)
        else:
            axes.plot(line.x, line.y, color=colour, alpha=0.8, **NULL)


def _limit(axes: Axes, figure: Lines) -> None:
    """Limits from the measured values, not from distant thresholds; ticks as plain as possible."""
    # Depths are counted: there is no depth 2.5.
    if not figure.log_x and all(are_whole(line.x) for line in figure.lines):
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.margins(x=0.02)
    axes.autoscale_view()
    _widen_flat_limits(axes, figure)
    # Measured before the loop: otherwise one threshold could bring the next one near.
    low, high = axes.get_ylim()
    for line in figure.lines:
        if line.role == "threshold" and _is_near(line.y[0], low, high, axes):
            axes.set_ylim(*_limits_including(line.y[0], axes))
    if figure.limits is not None:
        axes.set_ylim(*figure.limits)
    if axes.get_yscale() == "log":
        plain_ticks(axes.yaxis, *axes.get_ylim())


def _widen_flat_limits(axes: Axes, figure: Lines) -> None:
    """Limits around curves that differ by rounding only."""
    lines = [line for line in figure.lines if line.role in ("measured", "null")]
    values = np.concatenate(
        [part for line in lines for part in (line.y, line.lower, line.upper) if part is not None]
    )
    values = values[np.isfinite(values)]
    if values.size:
        low, high = float(values.min()), float(values.max())
        if visible_limits(low, high) != (low, high):
            axes.set_ylim(*visible_limits(low, high))


def _is_near(value: float, low: float, high: float, axes: Axes) -> bool:
    """Whether a threshold is at most a decade, or half the span, away: near enough to be shown. A heuristic of ours."""
    if axes.get_yscale() == "log":
        return value > 0 and low / 10 <= value <= high * 10
    return low - (high - low) / 2 <= value <= high + (high - low) / 2


def _limits_including(value: float, axes: Axes) -> tuple[float, float]:
    """The limits of the axis, widened so that a value is a little inside."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        return min(low, value / 1.15), max(high, value * 1.15)
    room = 0.03 * (high - low)
    return min(low, value - room), max(high, value + room)


def _draw_limits(axes: Axes, figure: Lines) -> None:
    """Thresholds and the healthy band, as far as they are in view; they never move the axes."""
    low, high = axes.get_ylim()
    words: dict[str, list[tuple[float, float]]] = {"right": [], "left": []}
    for line in figure.lines:
        if line.role == "threshold" and low <= line.y[0] <= high:
            side = _free_side(axes, figure, line.y[0], line.label, words)
            label = "" if side else plain(line.label)  # crowded at both ends: named in the legend
            axes.plot(line.x, line.y, color="0.35", linestyle=":", linewidth=0.9, zorder=1, label=label)
            if side:
                _name_threshold(axes, line, side)
                words[side].append(_heights_of_words(axes, line.y[0]))
    if figure.healthy is not None:
        bottom, top = max(low, figure.healthy[0]), min(high, figure.healthy[1])
        if bottom < top:
            axes.axhspan(bottom, top, color=HEALTHY, linewidth=0, zorder=0, label="healthy")
    axes.set_ylim(low, high)


def _share_of_words(axes: Axes, text: str) -> float:
    """The share of the width that the words about a threshold take: a letter is about half an em wide."""
    inches, _ = inches_of(axes)
    return min(1.0, 0.5 * len(text) * mpl.rcParams["font.size"] / 72 / max(inches, 0.5))


def _free_side(
    axes: Axes, figure: Lines, value: float, name: str, words: Mapping[str, Sequence[tuple[float, float]]]
) -> str:
    """The end of the axes where neither a curve nor other words are in the way of a threshold's name, or nothing."""
    measured = [line for line in figure.lines if line.role != "threshold" and line.x.size]
    first, last = min(line.x.min() for line in measured), max(line.x.max() for line in measured)
    wide = _share_of_words(axes, name) * (last - first)
    low, high = _heights_of_words(axes, value)
    for side, near in (("right", lambda x: x >= last - wide), ("left", lambda x: x <= first + wide)):
        heights = [
            _height_of(axes, y)
            for line in measured
            for values in (line.y, line.lower, line.upper)
            if values is not None
            for x, y in zip(line.x, values, strict=True)
            if near(x)
        ]
        is_taken = any(bottom < high and low < top for bottom, top in words[side])
        if not is_taken and not any(low <= height <= high for height in heights):
            return side
    return ""


def _heights_of_words(axes: Axes, value: float) -> tuple[float, float]:
    """Where the words about a threshold begin and end, between the bottom (0) and the top (1) of the axes."""
    below, above = _room_of_words(axes, value)
    return _height_of(axes, value) + below, _height_of(axes, value) + above


def _room_of_words(axes: Axes, value: float) -> tuple[float, float]:
    """What the words about a threshold take below and above it, as shares of the height: above, or below at the top."""
    _, inches = inches_of(axes)
    words = 1.5 * mpl.rcParams["font.size"] / 72 / max(inches, 0.5)
    return (-words, 0.02) if _height_of(axes, value) + words > 1 else (-0.02, words)


def _height_of(axes: Axes, value: float) -> float:
    """Height of a value between the bottom (0) and the top (1) of the axes; NaN for one that a log axis cannot show."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        return math.log(value / low) / math.log(high / low) if value > 0 else math.nan
    return (value - low) / (high - low)


def _name_threshold(axes: Axes, line: Line, side: str) -> None:
    # Above the axes are other words, such as a title.
    above = _room_of_words(axes, line.y[0])[1] > 0.02
    axes.annotate(
        plain(line.label),
        (1 if side == "right" else 0, line.y[0]),
        xycoords=("axes fraction", "data"),
        xytext=(-2 if side == "right" else 2, 1.5 if above else -1.5),
        textcoords="offset points",
        ha=side,
        va="bottom" if above else "top",
        color="0.35",
        fontsize=mpl.rcParams["xtick.labelsize"],
    )


def _legend(canvas: Canvas, axes: Axes, figure: Lines, size: Width, named: Sequence[tuple[Any, str]]) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if named:
        num_measured = sum(line.role == "measured" for line in figure.lines)
        # The measured lines are drawn first.
        handles = [*(handle for handle, _ in named), *handles[num_measured:]]
        labels = [*(label for _, label in named), *labels[num_measured:]]
    # Nulls have the colours of their runs; one grey entry represents all of a kind.
    if any(line.role == "null" for line in figure.lines):
        handles.append(Line2D([], [], color="0.4", **NULL))
        labels.append(NOISE_BASELINE)
    # The caption names what a single line shows.
    if len(handles) < 2:
        return
    if _is_inside(figure, labels):
        axes.legend(handles, labels, loc="best")
    else:
        canvas.legend(handles, labels, loc="outside lower center", ncols=num_columns(labels, size))
