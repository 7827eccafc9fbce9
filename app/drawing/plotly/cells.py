"""How is a heat map drawn on a screen, and what do all drawings share? Layout, words, ticks, maps small enough to send."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go

from depthscope.app.figures import Heatmap
from depthscope.app.figures.build.bins import Bins, reduce_blocks
from depthscope.app.figures.palette import RUN_COLOURS
from depthscope.app.text.visible import LONGEST_LABEL, shortened, visible

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
    limits, ticks = figure.limits, {}
    if figure.log_z:
        limits = (np.log10(limits[0]), np.log10(limits[1])) if limits is not None and limits[0] > 0 else None
        known = shown[np.isfinite(shown)]
        ticks = log_ticks(float(known.min()), float(known.max()), most_ticks) if known.size else {}
        ticks |= {"tickvals": np.log10(ticks["tickvals"]).tolist()} if ticks else {}
    names = _cell_names(figure)
    value = f"<b>%{{{'customdata' if figure.log_z else 'z'}:.4~g}}</b><extra></extra>"
    place = f"{words(figure.x_label)} %{{x:.4~g}}, {words(figure.y_label)} %{{y:.4~g}}<br>"
    bar = {
        "title": {"text": words(figure.z_label), "side": "right", "font": {"size": 12.5}},
        "thickness": 12,
        "outlinewidth": 0,
        "len": 0.9,
    }
    return go.Figure(
        go.Heatmap(
            x=figure.x,
            y=figure.y,
            z=shown,
            customdata=z if figure.log_z else None,
            text=names,
            zmin=None if limits is None else limits[0],
            zmax=None if limits is None else limits[1],
            # plotly takes the middle only where it sets the ends itself.
            zmid=0.0 if figure.diverging and limits is None else None,
            colorscale=DIVERGING if figure.diverging else "Viridis",
            meta="diverging" if figure.diverging else None,  # a dark page has other colours around zero
            colorbar=bar | ticks,
            hoverongaps=False,
            hovertemplate=("%{text}<br>" if names else "") + ("" if figure.named_only else place) + value,
        )
    )


def _cell_names(figure: Heatmap) -> list[list[str]] | None:
    """Names of both ends of a cell, while they are few enough to send."""
    if (
        figure.x_text is None
        or figure.y_text is None
        or (figure.z.size > LARGEST_NAMED and not figure.named_only)
    ):
        return None
    return [[f"{words(column)}<br>{words(row)}" for column in figure.x_text] for row in figure.y_text]


def set_layout(drawn: go.Figure, **options: Any) -> None:
    """Set options of a layout; what is already set of an axis stays."""
    known = drawn.layout.to_plotly_json()
    drawn.layout = {
        **known,
        **{
            name: {**value, **known[name]} if isinstance(value, dict) and name in known else value
            for name, value in options.items()
        },
    }


def words(text: str, longest: int = LONGEST_LABEL) -> str:
    """Text that plotly draws as it is.

    ``text``: label of a line, an axis, a position.
    ``longest``: letters after which the middle is left out.

    Examples
    --------
    >>> words("<a href='javascript:x'>R&D</a> %{x}")
    "&lt;a href='javascript:x'&gt;R&amp;D&lt;/a&gt; &#37;{x}"
    """
    # An entity also for the percent sign: a template of a hover would fill in what "%{…}" names.
    shown = shortened(visible(shortened(text, longest, counted=False)), longest, counted=False)
    return html.escape(shown, quote=False).replace("%{", "&#37;{")


PALETTE = RUN_COLOURS
DASHES = ("solid", "dash", "dashdot", "longdash", "dot")
# Half grey, and colours that let the page through: legible on white and on black.
GREY = "rgba(128, 128, 128, 0.9)"
FAINT = "rgba(128, 128, 128, 0.18)"
HEALTHY = "rgba(34, 136, 51, 0.07)"
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
DIVERGING = ((0.0, "#2166AC"), (0.25, "#92C5DE"), (0.5, "#F7F7F7"), (0.75, "#F4A582"), (1.0, "#B2182B"))


_STEPS = (
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0),
    (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0),
)
"""Round numbers of a decade, from few to many."""


def round_numbers(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from one exponent of ten to another: as many as are allowed, and where they can be at least two.

    Examples
    --------
    >>> round_numbers(0.0, 1.0, 3), round_numbers(-5.2, -4.8, 5), round_numbers(0.30, 0.32, 3)
    ([1.0, 3.0, 10.0], [8e-06, 1e-05, 1.2e-05, 1.5e-05], [2.0, 2.05])
    >>> round_numbers(0.2, 21.0, 6)
    [10.0, 100000.0, 1000000000.0, 10000000000000.0, 1e+17, 1e+21]
    """
    decades = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    # 1e-6: an end that is a round number is not lost to the rounding of its logarithm.
    found = [
        [
            step * 10.0**decade
            for decade in decades
            for step in steps
            if low - 1e-6 <= np.log10(step) + decade <= high + 1e-6
        ]
        for steps in _STEPS
    ]
    few = [each for each in found if len(each) <= most]
    if few and len(few[-1]) > 1:
        return [float(f"{each:.6g}") for each in few[-1]]
    if few and high - low > 1:
        return few[-1]
    powers = [10.0**decade for decade in decades if low <= decade <= high]
    if len(powers) > most:
        return powers[:: -(-len(powers) // most)]
    first, last = 10.0**low, 10.0**high
    if last <= first * (1 + 1e-6):
        return [float(f"{first:.6g}")]
    size = 10.0 ** np.floor(np.log10(last - first))
    for step in (size * each for each in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)):
        ticks = np.arange(np.ceil(first / step - 1e-6), np.floor(last / step + 1e-6) + 1) * step
        if len(ticks) <= most:
            return [float(f"{each:.6g}") for each in ticks]
    return []


def log_ticks(low: float, high: float, most: int = 6) -> dict[str, Any]:
    """Ticks of a logarithmic axis between two exponents of ten."""
    values = round_numbers(low, high, most)
    names = [f"{value:g}".replace("e-0", "e-").replace("e+0", "e") for value in values]
    return {"tickvals": values, "ticktext": names} if values else {}


def log_axis(low: float, high: float, most: int = 6) -> dict[str, Any]:
    """A logarithmic axis between two exponents of ten: decades on a long one, round numbers on a short one."""
    is_long = high - low > 2
    ticks = {"dtick": max(1, round((high - low) / most))} if is_long else log_ticks(low, high, most)
    return {"type": "log", "exponentformat": "power", "tickfont": {"size": 11}, **ticks}
