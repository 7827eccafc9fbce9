"""How is a heat map drawn on a screen? Small enough to send, with round numbers on a logarithmic bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go

from depthscope.app.drawing.plotly.layout import DIVERGING, log_ticks, words
from depthscope.app.figures import Heatmap
from depthscope.app.figures.build.bins import Bins, reduce_blocks

# 300 × 300 numbers of float32 are 480 kB in the JSON of a figure; the names of 64 × 64 cells are about 120 kB of text.
LARGEST_SIDE = 300
LARGEST_NAMED = 64 * 64


def shrink(figure: Heatmap) -> Heatmap:
    """Heat map small enough for a screen: neighbours along a long axis are one cell, which the caption states.

    Returns: The same one where nothing had to be reduced.
    """
    note = reduction_words(figure)
    if not note:
        return figure
    across, up = _bins(figure)
    return replace(
        figure,
        x=across.centres,
        y=up.centres,
        z=reduce_blocks(figure.z, up, across, by=figure.of_block),
        x_text=_block_names(figure.x_text, across),
        y_text=_block_names(figure.y_text, up),
        caption=f"{figure.caption} Reduced for the screen: {note}; the table has every cell.".strip(),
    )


def reduction_words(figure: Heatmap) -> str:
    """What a cell on a screen is of a figure that is too large for one; empty where it is a cell of the figure."""
    labels = (figure.x_label, figure.y_label)
    reduced = [
        f"{bins.largest} along {label.partition(' (')[0]}"
        for bins, label in zip(_bins(figure), labels, strict=True)
        if bins.largest > 1
    ]
    return f"each cell is the {figure.of_block} of up to {' by '.join(reduced)}" if reduced else ""


def _bins(figure: Heatmap) -> tuple[Bins, Bins]:
    """Of the horizontal and the vertical axis, each by itself."""
    across, up = (
        Bins.of(values, len(values) if axis in figure.categorical else LARGEST_SIDE)
        for axis, values in (("x", figure.x), ("y", figure.y))
    )
    return across, up


def _block_names(names: Sequence[str] | None, bins: Bins) -> list[str] | None:
    if names is None:
        return None
    ends = [*bins.starts[1:], len(names)]
    return [
        names[first] if end - first == 1 else f"{names[first]} to {names[end - 1]}"
        for first, end in zip(bins.starts, ends, strict=True)
    ]


def draw_heatmap(figure: Heatmap, *, most_ticks: int = 9) -> go.Figure:
    """Heat map, its numbers as float32."""
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
            meta="diverging" if figure.diverging else None,  # a dark page has other colours around zero
            colorbar=bar | (_log_ticks(shown, most_ticks) if figure.log_z else {}),
            hoverongaps=False,
            hovertemplate=_hover(figure),
        )
    )
    return drawn


def _log_limits(limits: tuple[float, float] | None) -> tuple[float, float] | None:
    if limits is None or limits[0] <= 0:
        return None
    return float(np.log10(limits[0])), float(np.log10(limits[1]))


def _log_ticks(shown: np.ndarray, most: int) -> dict[str, Any]:
    """Round numbers on a colour bar of logarithms."""
    known = shown[np.isfinite(shown)]
    if known.size == 0:
        return {}
    ticks = log_ticks(float(known.min()), float(known.max()), most)
    return {**ticks, "tickvals": np.log10(ticks["tickvals"]).tolist()} if ticks else {}


def _cell_names(figure: Heatmap) -> list[list[str]] | None:
    """Names of both ends of a cell, while they are few enough to send."""
    if (
        figure.x_text is None
        or figure.y_text is None
        or (figure.z.size > LARGEST_NAMED and not figure.named_only)
    ):
        return None
    return [[f"{words(column)}<br>{words(row)}" for column in figure.x_text] for row in figure.y_text]


def _hover(figure: Heatmap) -> str:
    value = "%{customdata:.4~g}" if figure.log_z else "%{z:.4~g}"
    names = "%{text}<br>" if _cell_names(figure) is not None else ""
    if figure.named_only:
        return f"{names}<b>{value}</b><extra></extra>"
    across, up = words(figure.x_label), words(figure.y_label)
    return f"{names}{across} %{{x:.4~g}}, {up} %{{y:.4~g}}<br><b>{value}</b><extra></extra>"
