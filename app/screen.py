"""How is a figure drawn on a screen? By plotly, on the same numbers that paper gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures import Figure, Heatmap, Line, Lines
from app.figures.values import reduce_blocks

__all__ = ["LARGEST_SIDE", "PALETTE", "shrink", "to_plotly"]

# Paul Tol's "bright": told apart by colour-blind eyes and on white and black pages alike
PALETTE = ("#4477AA", "#EE6677", "#228833", "#AA3377", "#66CCEE", "#CCBB44")
LARGEST_SIDE = 300
LARGEST_NAMED = 64

_DASHES = ("solid", "dash", "dashdot", "longdash", "dot")
_GREY = "rgba(128, 128, 128, 0.9)"
_FAINT = "rgba(128, 128, 128, 0.18)"
_HEALTHY = "rgba(34, 136, 51, 0.07)"
_FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
_DIVERGING = ((0.0, "#2166AC"), (0.25, "#92C5DE"), (0.5, "#F7F7F7"), (0.75, "#F4A582"), (1.0, "#B2182B"))


def to_plotly(
    figure: Figure, *, mark: tuple[float, float] | None = None, runs: Sequence[str] = ()
) -> go.Figure:
    """Plotly figure of a specification; numbers stay typed arrays.

    Parameters
    ----------
    figure : Lines or Heatmap
        What to draw. Heat maps above 300 × 300 are reduced by blocks and say so in their caption (`shrink`).
    mark : tuple of float or None
        Cell of a heat map, (x, y), to ring.
    runs : sequence of str
        Runs in the order of their colours, so that a run keeps its colour in figures that lack another one;
        empty takes the order of the figure.

    Returns
    -------
    plotly.graph_objects.Figure

    Examples
    --------
    >>> line = Line(np.arange(3.0), np.array([4.0, 2.0, 1.0]), "a")
    >>> drawn = to_plotly(Lines("rank", "Rank", "depth", "rank", (line,)))
    >>> drawn.data[0].y.tolist()
    [4.0, 2.0, 1.0]
    """
    drawn = _draw_lines(figure, runs) if isinstance(figure, Lines) else _draw_heatmap(shrink(figure), mark)
    drawn.update_layout(**_layout(figure))
    return drawn


def shrink(figure: Heatmap) -> Heatmap:
    """Heat map small enough for a screen: block means, said in the caption.

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
    said = (
        f"Reduced for the screen: each cell is the mean of a {side} × {side} block; the table has every cell."
    )
    return replace(
        figure,
        x=figure.x[::side],
        y=figure.y[::side],
        z=z,
        x_text=None if figure.x_text is None else list(figure.x_text)[::side],
        y_text=None if figure.y_text is None else list(figure.y_text)[::side],
        caption=f"{figure.caption} {said}".strip(),
    )


# --- lines ---


def _draw_lines(figure: Lines, runs: Sequence[str]) -> go.Figure:
    drawn = go.Figure()
    looks = _looks(figure.lines, runs)
    crowded = any(look.dash != _DASHES[0] for look in looks if look.measured)
    num_bands = sum(line.lower is not None for line in figure.lines)
    for line, look in zip(figure.lines, looks, strict=True):
        if line.lower is not None and line.upper is not None:
            drawn.add_trace(_band(line, look.colour, figure.log_y, opacity=0.16 if num_bands < 3 else 0.09))
    few = sum(look.measured for look in looks) <= 4
    for line, look in zip(figure.lines, looks, strict=True):
        drawn.add_trace(_curve(line, look, marked=few and len(line.x) <= 40, named=not crowded))
        if line.role == "threshold":
            _name_threshold(drawn, line, figure.log_y)
    if crowded:
        drawn.add_traces(_key(figure.lines, looks))
    span = _y_range(figure)
    if figure.healthy is not None and span is not None:
        _shade(drawn, figure.healthy, span)
    drawn.update_yaxes(**_scale(span, figure.log_y))
    return drawn


def _name_threshold(drawn: go.Figure, line: Line, log_y: bool) -> None:
    """Label at the right end of a threshold, instead of an entry in the legend."""
    level = float(line.y[0])
    drawn.add_annotation(
        x=1,
        xref="paper",
        xanchor="right",
        y=np.log10(level) if log_y else level,
        yanchor="bottom",
        showarrow=False,
        text=line.label,
        font={"size": 11, "color": _GREY},
    )


@dataclass(frozen=True)
class _Look:
    """How one line is drawn."""

    colour: str
    dash: str
    measured: bool


def _looks(lines: Sequence[Line], runs: Sequence[str]) -> list[_Look]:
    """Colour and dash of every line: a run keeps one colour; within it dashes tell lines apart."""
    groups = list(runs) or list(dict.fromkeys(line.group for line in lines if line.role == "measured"))
    several = len(groups) > 1
    seen: dict[str, int] = {}
    looks: list[_Look] = []
    for line in lines:
        if line.role == "threshold":
            looks.append(_Look(_GREY, "dot", measured=False))
        elif line.role == "null":
            colour = looks[-1].colour if looks else PALETTE[0]
            looks.append(_Look(colour, "dash", measured=False))
        else:
            rank = seen.get(line.group, 0)
            seen[line.group] = rank + 1
            colour = PALETTE[(groups.index(line.group) if several else rank) % len(PALETTE)]
            looks.append(_Look(colour, _DASHES[rank % len(_DASHES)] if several else "solid", measured=True))
    return looks


def _curve(line: Line, look: _Look, *, marked: bool, named: bool) -> go.Scatter:
    return go.Scatter(
        x=line.x,
        y=line.y,
        name=line.label,
        mode="lines+markers" if look.measured and marked else "lines",
        line={"color": look.colour, "dash": look.dash, "width": 2.2 if look.measured else 1.3},
        marker={"size": 4.5},
        opacity=1.0 if look.measured else 0.7,
        legendgroup=line.label if named else line.group,
        text=None if line.text is None else list(line.text),
        hovertemplate="%{y:.4~g}  (%{text})" if line.text is not None else "%{y:.4~g}",
        hoverinfo="skip" if line.role == "threshold" else None,
        showlegend=look.measured and named,
    )


def _key(lines: Sequence[Line], looks: Sequence[_Look]) -> list[go.Scatter]:
    """Legend of many lines: one entry for each run by colour, one for each variant by dash."""
    entries: dict[str, dict[str, Any]] = {}
    variants: dict[str, dict[str, Any]] = {}
    for line, look in zip(lines, looks, strict=True):
        if look.measured:
            entries.setdefault(line.group, {"color": look.colour, "width": 4})
            variant = line.label.removeprefix(f"{line.group} · ")
            variants.setdefault(variant, {"color": _GREY, "width": 1.8, "dash": look.dash})
    return [
        go.Scatter(
            x=[None], y=[None], mode="lines", name=name, line=style, legendgroup=name, hoverinfo="skip"
        )
        for name, style in (entries | variants).items()
    ]


def _band(line: Line, colour: str, log_y: bool, opacity: float) -> go.Scatter:
    """Closed outline of the spread; NaN and, on a log axis, what is not positive is left out."""
    assert line.lower is not None
    assert line.upper is not None
    known = np.isfinite(line.lower) & np.isfinite(line.upper)
    lower = np.where(line.lower > 0, line.lower, np.nan) if log_y else line.lower
    known &= np.isfinite(lower)
    x, low, high = line.x[known], lower[known], line.upper[known]
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return go.Scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([high, low[::-1]]),
        fill="toself",
        fillcolor=f"rgba({red}, {green}, {blue}, {opacity})",
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=line.label,
        name=f"{line.label} · spread",
    )


def _shade(drawn: go.Figure, healthy: tuple[float, float], span: tuple[float, float]) -> None:
    """Healthy band behind the curves, cut at the ends of the axis."""
    low, high = max(healthy[0], span[0]), min(healthy[1], span[1])
    if low < high:
        drawn.add_hrect(y0=low, y1=high, fillcolor=_HEALTHY, line_width=0, layer="below")


def _y_range(figure: Lines) -> tuple[float, float] | None:
    """Ends of the vertical axis: the curves, their bands, and the nearest threshold on either side."""
    known = _drawable(figure, ("measured", "null"))
    if known.size == 0:
        return None
    low, high = float(known.min()), float(known.max())
    limits = _drawable(figure, ("threshold",))
    above, below = limits[limits > high], limits[limits < low]
    high = float(above.min()) if above.size else high
    low = float(below.max()) if below.size else low
    if figure.log_y:
        margin = (high / low) ** 0.08 if high > low else 2.0
        return low / margin, high * margin
    margin = 0.08 * (high - low) if high > low else 0.1 * abs(high) or 0.5
    return low - margin, high + margin


def _drawable(figure: Lines, roles: tuple[str, ...]) -> np.ndarray:
    """All values of the lines of some roles that the axis can show."""
    lines = [line for line in figure.lines if line.role in roles]
    parts = [part for line in lines for part in (line.y, line.lower, line.upper) if part is not None]
    values = np.concatenate([np.asarray(part, dtype=np.float64) for part in parts] or [np.zeros(0)])
    return values[np.isfinite(values) & ((values > 0) | (not figure.log_y))]


def _scale(span: tuple[float, float] | None, log_y: bool) -> dict[str, Any]:
    """Range and ticks of the vertical axis: decades on a long log axis, 1-2-5 on a short one."""
    if span is None:
        return {"type": "log"} if log_y else {}
    if not log_y:
        return {"range": list(span)}
    ends = [float(np.log10(end)) for end in span]
    decades = ends[1] - ends[0]
    ticks = {"dtick": max(1, round(decades / 6))} if decades > 2 else {"dtick": "D2"}
    return {"type": "log", "range": ends, "exponentformat": "power", "tickfont": {"size": 11}, **ticks}


# --- heat maps ---


def _draw_heatmap(figure: Heatmap, mark: tuple[float, float] | None) -> go.Figure:
    z = np.asarray(figure.z, dtype=np.float32)
    shown = _log(z) if figure.log_z else z
    limits = _log_limits(figure.limits) if figure.log_z else figure.limits
    bar = {
        "title": {"text": figure.z_label, "side": "right", "font": {"size": 12.5}},
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
            zmid=0.0 if figure.diverging and limits is None else None,
            colorscale=_DIVERGING if figure.diverging else "Viridis",
            colorbar=bar | (_log_ticks(shown) if figure.log_z else {}),
            hoverongaps=False,
            hovertemplate=_hover(figure),
        )
    )
    if mark is not None:
        _ring(drawn, figure, mark)
    return drawn


def _log(z: np.ndarray) -> np.ndarray:
    return np.log10(z, out=np.full_like(z, np.nan), where=z > 0)


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
    steps = (
        (1.0,) if high - low > 3 else (1, 2, 5) if high - low > 1 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    )
    decades = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    values = np.array([step * 10.0**decade for decade in decades for step in steps])
    inside = values[(np.log10(values) >= low - 1e-6) & (np.log10(values) <= high + 1e-6)]
    return {"tickvals": np.log10(inside).tolist(), "ticktext": [f"{value:g}" for value in inside]}


def _cell_names(figure: Heatmap) -> list[list[str]] | None:
    """Names of both ends of a cell, while they are few enough to send."""
    if figure.x_text is None or figure.y_text is None or max(figure.z.shape) > LARGEST_NAMED:
        return None
    return [[f"{column}<br>{row}" for column in figure.x_text] for row in figure.y_text]


def _hover(figure: Heatmap) -> str:
    value = "%{customdata:.4g}" if figure.log_z else "%{z:.4g}"
    names = "%{text}<br>" if _cell_names(figure) is not None else ""
    return (
        f"{names}{figure.x_label} %{{x:.4~g}}, {figure.y_label} %{{y:.4~g}}<br><b>{value}</b><extra></extra>"
    )


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


# --- both ---


def _layout(figure: Figure) -> dict[str, Any]:
    """Quiet axes on a transparent page; `uirevision` keeps zoom and hidden lines when the data change."""
    axis = {"gridcolor": _FAINT, "zeroline": False, "linecolor": _FAINT, "ticks": "", "automargin": True}
    x_axis = {**axis, "title": {"text": figure.x_label, "standoff": 6, "font": {"size": 12.5}}}
    y_axis = {**axis, "title": {"text": figure.y_label, "standoff": 6, "font": {"size": 12.5}}}
    if isinstance(figure, Lines):
        return _frame(figure) | {
            "xaxis": {**x_axis, "showgrid": False},
            "yaxis": y_axis,
            "hovermode": "x unified",
        }
    bare = {"showgrid": False, "showline": False}
    return _frame(figure) | {
        "xaxis": x_axis | bare | {"constrain": "domain"},
        "yaxis": y_axis | bare | {"scaleanchor": "x", "constrain": "domain"},
    }


def _frame(figure: Figure) -> dict[str, Any]:
    return {
        "uirevision": figure.name,
        "template": "none",
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "font": {"family": _FONT, "size": 12.5},
        "margin": {"l": 56, "r": 16, "t": 12, "b": 44},
        "legend": {
            "orientation": "h",
            "yanchor": "bottom",
            "y": 1.0,
            "xanchor": "left",
            "x": 0,
            "font": {"size": 12},
        },
        "hoverlabel": {"font": {"family": _FONT, "size": 12}},
        "modebar": {"bgcolor": "rgba(0, 0, 0, 0)", "color": "rgba(128, 128, 128, 0.6)"},
    }
