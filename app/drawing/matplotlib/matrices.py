"""How is a matrix drawn on paper? Cells at their positions, undefined ones in grey, rasterised when dense."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator

from depthscope.app.drawing.matplotlib.style import are_whole, plain, plain_ticks
from depthscope.app.figures.build.bins import edges
from depthscope.app.figures.specification import Heatmap

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
    if 0 < len(figure.x_names) <= MOST_NAMES:
        axes.set_xticks(figure.x, [plain(name) for name in figure.x_names], rotation=90)
    if figure.printed:
        _print_cells(axes, figure, mesh)
    return mesh


def add_bar(axes: Axes, mesh: QuadMesh, label: str) -> None:
    """The colour bar of a matrix, to the right of its axes."""
    bar = axes.figure.colorbar(mesh, ax=axes, label=label, fraction=0.06, pad=0.03)
    bar.outline.set_linewidth(0.4)
    if isinstance(mesh.norm, LogNorm):
        plain_ticks(bar.ax.yaxis, *bar.ax.get_ylim())


MOST_NAMES = 40
"""Columns up to which their names have room below a map as wide as a column. A heuristic of ours."""

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
