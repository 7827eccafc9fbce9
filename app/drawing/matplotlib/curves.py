"""How are curves and matrices drawn on paper? Colour by run, dashes by variant; cells rasterised when dense."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator

from depthscope.app.drawing.matplotlib.style import are_whole, inches_of, num_letters, plain, plain_ticks
from depthscope.app.figures.build.bins import edges, visible_limits
from depthscope.app.figures.palette import MARK_EDGE, SHAPES, Look
from depthscope.app.figures.specification import Heatmap, Line, Lines

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
    # On a log axis without a positive value matplotlib warns and draws nothing.
    if figure.log_y and any(bool(np.any(line.y > 0)) for line in figure.of("measured")):
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
    values = figure.numbers("measured", "null")
    if values.size:
        low, high = float(values.min()), float(values.max())
        if visible_limits(low, high) != (low, high):  # they differ by rounding alone
            axes.set_ylim(*visible_limits(low, high))
    is_log = axes.get_yscale() == "log"
    scale, back = (np.log10, partial(np.power, 10.0)) if is_log else (np.asarray, np.asarray)
    low, high = scale(axes.get_ylim())
    # A threshold that is at most a decade, or half the span, away is shown, a little inside. Heuristics of ours.
    reach, room = (1.0, 0.06) if is_log else ((high - low) / 2, 0.03 * (high - low))
    levels = [
        line.y[0] for line in figure.lines if line.role == "threshold" and (line.y[0] > 0 or not is_log)
    ]
    near = [level for level in scale(levels) if low - reach <= level <= high + reach]
    if near:
        axes.set_ylim(*back([min(low, min(near) - room), max(high, max(near) + room)]))
    if is_log:
        plain_ticks(axes.yaxis, *axes.get_ylim())


def _draw_limits(axes: Axes, figure: Lines) -> None:
    """Thresholds with their names and the healthy band, as far as they are in view; they never move the axes."""
    low, high = axes.get_ylim()
    inches = inches_of(axes)
    # The share of the height that they take
    words = 1.5 * mpl.rcParams["font.size"] / 72 / max(inches[1], 0.5)
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


def measured_of(contents: Sequence[Any]) -> list[Line]:
    """The measured lines of some panels."""
    return [line for content in contents if isinstance(content, Lines) for line in content.of("measured")]


# Cells from which a mesh is rasterised inside the vector file: as vectors, each is a path that viewers draw one by one.
DENSE = 400
DENSE_ON_A_PAGE = 64  # a report of four runs has thirty matrices; nobody prints it larger than it is


def plot_heatmap(axes: Axes, figure: Heatmap, *, dense: int = DENSE) -> QuadMesh:
    """Draw a matrix into axes; labels and colour bar are left to the caller.

    ``dense``: cells from which the mesh is rasterised.
    """
    mesh = axes.pcolormesh(
        edges(figure.x),
        edges(figure.y),
        np.ma.masked_invalid(figure.z),
        norm=_norm(figure),
        # Both grow lighter from end to end, so that they can be read in grey; cividis turns from blue to yellow at zero.
        cmap="cividis" if figure.diverging else "viridis",
        rasterized=figure.z.size > dense,
        edgecolors="face",  # viewers show white seams between cells without an edge
        linewidth=0.1,
    )
    axes.set_facecolor("0.9")  # undefined cells
    if figure.square and figure.z.shape[0] == figure.z.shape[1]:
        axes.set_aspect("equal")
    if figure.from_top:
        axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(True)
    for axis, values in ((axes.xaxis, figure.x), (axes.yaxis, figure.y)):
        # Of a single position there is one tick, and none between integers.
        axis.set_major_locator(
            MaxNLocator("auto", steps=[1, 2, 5, 10], integer=are_whole(values), min_n_ticks=1)
        )
    if figure.printed:
        _print_cells(axes, figure, mesh)
    return mesh


def add_bar(axes: Axes, mesh: QuadMesh, label: str) -> None:
    """The colour bar of a matrix, to the right of its axes."""
    bar = axes.figure.colorbar(mesh, ax=axes, label=label, fraction=0.06, pad=0.03)
    bar.outline.set_linewidth(0.4)
    if isinstance(mesh.norm, LogNorm):
        plain_ticks(bar.ax.yaxis, *bar.ax.get_ylim())


# Streams up to which a cell has room for its number; a matrix of more shows colours, and sums as far as they fit.
MOST_PRINTED = 5
MOST_SUMS = 8


def _print_cells(axes: Axes, figure: Heatmap, mesh: QuadMesh) -> None:
    """The first row on top, as a matrix is written; sums of columns below, sums of rows at the right."""
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.set_yticks([])
    if len(figure.x) <= MOST_SUMS and len(figure.y) <= MOST_SUMS:
        right = axes.secondary_yaxis("right")
        right.set_yticks(figure.y, [_two_decimals(value) for value in figure.z.sum(axis=1)])
        right.tick_params(length=0)
        right.spines["right"].set_linewidth(0)
        axes.set_xticks(figure.x, [_two_decimals(value) for value in figure.z.sum(axis=0)])
    if max(figure.z.shape) > MOST_PRINTED:
        return
    for row, y in enumerate(figure.y):
        for column, x in enumerate(figure.x):
            value = figure.z[row, column]
            # Dark cells get white digits: 0.5 is the grey between.
            grey = float(np.dot(mesh.cmap(mesh.norm(value))[:3], (0.299, 0.587, 0.114)))
            colour = "white" if np.isfinite(value) and grey < 0.5 else "black"
            axes.text(
                x,
                y,
                _two_decimals(value),
                ha="center",
                va="center",
                color=colour,
                fontsize=mpl.rcParams["ytick.labelsize"],
            )


def _two_decimals(value: float) -> str:
    """As the mHC paper prints its matrices; in powers of ten where two decimals have no room."""
    if not np.isfinite(value):
        return "–"
    text = f"{value:.2f}" if abs(value) < 100 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    text = "0.00" if text == "-0.00" else text
    return text.replace("-", "−")


FLAT = 1.0001
"""Ratio of the largest to the smallest value up to which a logarithmic map is drawn in one colour. A heuristic of ours."""


def _norm(figure: Heatmap) -> Normalize:
    known = figure.z[np.isfinite(figure.z)]
    if figure.log_z and bool(np.any(known > 0)):
        positive = known[known > 0]
        low, high = figure.limits or (float(positive.min()), float(positive.max()))
        # Declared limits may begin at zero, which a logarithm has not.
        low = low if low > 0 else float(positive.min())
        # The rounding of equal values is no pattern.
        return LogNorm(low, high) if high > low * FLAT else LogNorm(low / 2, high * 2)
    low, high = figure.limits or ((float(known.min()), float(known.max())) if known.size else (0.0, 1.0))
    if figure.diverging:
        low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
    # Values cannot be scaled to a range of no width.
    return Normalize(low, high if high > low else low + 1e-6)
