"""How is a heat map drawn on a screen? Small enough to send, with round numbers on a logarithmic bar."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go

from depthscope.app.drawing.plotly.colours import DIVERGING
from depthscope.app.drawing.plotly.labels import words
from depthscope.app.figures import Heatmap
from depthscope.app.figures.build.values import reduce_blocks

__all__ = ["LARGEST_SIDE", "draw_heatmap", "shrink"]

# 300 × 300 numbers of float32 are 480 kB in the JSON of a figure; the names of 64 × 64 cells are about 120 kB of text.
LARGEST_SIDE = 300
LARGEST_NAMED = 64


def shrink(figure: Heatmap) -> Heatmap:
    """Heat map small enough for a screen: block means, which the caption states.

    Parameters
    ----------
    figure : Heatmap
        Any size.

    Returns
    -------
    Heatmap
        The same one where nothing had to be reduced.
    """
    z, side = reduce_blocks(figure.z, LARGEST_SIDE)
    if side == 1:
        return figure
    note = (
        f"Reduced for the screen: each cell is the mean of a {side} × {side} block; the table has every cell."
    )
    return replace(
        figure,
        x=figure.x[::side],
        y=figure.y[::side],
        z=z,
        x_text=None if figure.x_text is None else list(figure.x_text)[::side],
        y_text=None if figure.y_text is None else list(figure.y_text)[::side],
        caption=f"{figure.caption} {note}".strip(),
    )


def draw_heatmap(figure: Heatmap, mark: tuple[float, float] | None = None) -> go.Figure:
    """Heat map, its numbers as float32, with one cell ringed where asked.

    Parameters
    ----------
    figure : Heatmap
        What to draw, small enough already.
    mark : tuple of float or None
        Cell to ring, (x, y).

    Returns
    -------
    plotly.graph_objects.Figure
    """
    # Half the bytes of float64 in the JSON, at more digits than a colour or a hover shows.
    z = np.asarray(figure.z, dtype=np.float32)
    # plotly has no logarithmic colour scale: logarithms are drawn, and the numbers go to the hover.
    # `where` leaves what has no logarithm undefined, without numpy's warning.
    shown = np.log10(z, out=np.full_like(z, np.nan), where=z > 0) if figure.log_z else z
    limits = _log_limits(figure.limits) if figure.log_z else figure.limits
    bar = {
        "title": {"text": words(figure.z_label), "side": "right", "font": {"size": 12.5}},
        "thickness": 12,
        "outlinewidth": 0,
        "len": 0.9,
    }
    drawn = go.Figure(
        go.Heatmap(
            x=figure.x,
            y=figure.y,
            z=shown,
            customdata=z if figure.log_z else None,
            text=_cell_names(figure),
            zmin=None if limits is None else limits[0],
            zmax=None if limits is None else limits[1],
            # plotly takes the middle only where it sets the ends itself.
            zmid=0.0 if figure.diverging and limits is None else None,
            colorscale=DIVERGING if figure.diverging else "Viridis",
            colorbar=bar | (_log_ticks(shown) if figure.log_z else {}),
            hoverongaps=False,
            hovertemplate=_hover(figure),
        )
    )
    if mark is not None:
        _ring(drawn, figure, mark)
    return drawn


def _log_limits(limits: tuple[float, float] | None) -> tuple[float, float] | None:
    if limits is None or limits[0] <= 0:
        return None
    return float(np.log10(limits[0])), float(np.log10(limits[1]))


def _log_ticks(shown: np.ndarray) -> dict[str, Any]:
    """Round numbers on a colour bar of logarithms."""
    known = shown[np.isfinite(shown)]
    if known.size == 0:
        return {}
    low, high = float(known.min()), float(known.max())
    # One tick a decade over three decades, 1-2-5 over one, else nearly every digit. Heuristics of ours.
    steps = (
        (1.0,) if high - low > 3 else (1, 2, 5) if high - low > 1 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    )
    decades = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    values = np.array([step * 10.0**decade for decade in decades for step in steps])
    # 1e-6: an end that is a round number is not lost to the rounding of its logarithm.
    inside = values[(np.log10(values) >= low - 1e-6) & (np.log10(values) <= high + 1e-6)]
    return {"tickvals": np.log10(inside).tolist(), "ticktext": [f"{value:g}" for value in inside]}


def _cell_names(figure: Heatmap) -> list[list[str]] | None:
    """Names of both ends of a cell, while they are few enough to send."""
    if figure.x_text is None or figure.y_text is None or max(figure.z.shape) > LARGEST_NAMED:
        return None
    return [[f"{words(column)}<br>{words(row)}" for column in figure.x_text] for row in figure.y_text]


def _hover(figure: Heatmap) -> str:
    value = "%{customdata:.4g}" if figure.log_z else "%{z:.4g}"
    names = "%{text}<br>" if _cell_names(figure) is not None else ""
    across, up = words(figure.x_label), words(figure.y_label)
    return f"{names}{across} %{{x:.4~g}}, {up} %{{y:.4~g}}<br><b>{value}</b><extra></extra>"


def _ring(drawn: go.Figure, figure: Heatmap, mark: tuple[float, float]) -> None:
    """Outline of one cell."""
    half_x, half_y = (float(axis[1] - axis[0]) / 2 if len(axis) > 1 else 0.5 for axis in (figure.x, figure.y))
    drawn.add_shape(
        type="rect",
        x0=mark[0] - half_x,
        x1=mark[0] + half_x,
        y0=mark[1] - half_y,
        y1=mark[1] + half_y,
        line={"color": "#EE6677", "width": 2.5},
    )
