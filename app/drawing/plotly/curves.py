"""How are curves drawn on a screen? A run keeps its colour, nulls are dashed, thresholds carry their name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from depthscope.app.drawing.plotly.cells import DASHES, GREY, HEALTHY, PALETTE, log_axis, words
from depthscope.app.figures import Line, Lines
from depthscope.app.figures.build.bins import visible_limits
from depthscope.app.figures.palette import MARK_EDGE, Look
from depthscope.app.figures.specification import looks_of


def draw_lines(figure: Lines) -> go.Figure:
    """Curves with their bands, nulls, thresholds and healthy range; the axes' titles come later."""
    drawn = go.Figure()
    looks = _drawn_as(figure)
    # Dashes appear where a run has several lines: the legend then lists runs and variants instead of every line.
    crowded = any(look.dash != DASHES[0] for look in looks if look.look)
    num_bands = sum(line.lower is not None for line in figure.lines)
    for line, look in zip(figure.lines, looks, strict=True):
        if line.lower is not None and line.upper is not None:
            # Bands add up where they overlap: many of them are fainter.
            drawn.add_trace(_band(line, look.colour, figure.log_y, opacity=0.16 if num_bands < 3 else 0.09))
    num_measured = sum(look.look is not None for look in looks)
    for line, look in zip(figure.lines, looks, strict=True):
        drawn.add_trace(
            _curve(
                line,
                look,
                # Marks of many or long lines run into each other: about twelve of each distinguish them. Heuristics of ours.
                most_marks=0 if num_measured <= 4 and len(line.x) <= 40 else 12,
                named=num_measured > 1 and not crowded,
            )
        )
        if line.role == "threshold":
            _name_level(drawn, line, line.label, figure)
    baseline = next(
        (line for line in figure.lines if line.role == "null" and np.isfinite(line.y).any()), None
    )
    if baseline is not None:
        _name_level(drawn, baseline, baseline.label.rpartition(" · ")[2], figure)
    if crowded:
        drawn.add_traces(_key(figure.lines, looks))
    span = _y_range(figure)
    if figure.healthy is not None and span is not None:
        _shade(drawn, figure.healthy, span)
    drawn.update_yaxes(**_scale(span, figure.log_y))
    return drawn


def _name_level(drawn: go.Figure, line: Line, label: str, figure: Lines) -> None:
    """Label of a level line at its right end, instead of an entry in the legend."""
    known = np.flatnonzero(np.isfinite(line.y) & ((line.y > 0) | (not figure.log_y)))
    if known.size:
        level = float(line.y[known[-1]])
        drawn.add_annotation(
            x=1,
            xref="paper",
            xanchor="right",
            y=np.log10(level) if figure.log_y else level,
            yanchor="bottom",
            showarrow=False,
            text=words(label),
            # The page's own colour, a little fainter: one grey has little contrast on white or on black.
            font={"size": 11},
            opacity=0.8,
        )


@dataclass(frozen=True)
class _Drawn:
    """How one line is drawn; only measured ones have a look of their own."""

    colour: str
    dash: str
    look: Look | None = None


def _drawn_as(figure: Lines) -> list[_Drawn]:
    """Colour and dash of every line: nulls have the colour of the measured line before them."""
    looks = looks_of(figure)
    colour = PALETTE[0]
    found = []
    for line in figure.lines:
        look = looks.get(id(line))
        colour = look.colour if look else colour
        if look:
            found.append(_Drawn(colour, DASHES[look.variant % len(DASHES)], look))
        elif line.role == "threshold":
            found.append(_Drawn(GREY, "dot"))
        else:
            found.append(_Drawn(colour, "dash"))
    return found


def _curve(line: Line, drawn: _Drawn, *, most_marks: int, named: bool) -> go.Scatter:
    look = drawn.look
    return go.Scatter(
        x=line.x,
        y=line.y,
        name=words(line.label),
        mode="lines+markers" if look else "lines",
        line={"color": drawn.colour, "dash": drawn.dash, "width": 2.2 if look else 1.3},
        marker=_mark(look) | {"maxdisplayed": most_marks} if look else None,
        # The interval over sequences at every point, where the band is something else.
        error_y=None if line.error is None else {"array": line.error, "color": drawn.colour} | _WHISKER,
        opacity=1.0 if look else 0.7,
        # Lines of one legend group are hidden together: a line with its null and band.
        legendgroup=line.label if named else line.group,
        text=None if line.text is None else list(map(words, line.text)),
        hovertemplate="%{y:.4~g}  (%{text})" if line.text is not None else "%{y:.4~g}",
        hoverinfo="skip" if line.role == "threshold" else None,
        showlegend=look is not None and named,
    )


def _mark(look: Look) -> dict[str, Any]:
    """A mark in the shape of a run, with an edge that is seen on every page."""
    inside = "white" if look.hollow else look.colour
    return {"symbol": look.shape, "size": 5.5, "color": inside, "line": {"color": MARK_EDGE, "width": 0.9}}


_WHISKER = {"type": "data", "thickness": 1.2, "width": 2}


def _key(lines: Sequence[Line], drawn: Sequence[_Drawn]) -> list[go.Scatter]:
    """Legend of many lines: one entry for each run by colour and mark, one for each variant by dash."""
    runs: dict[str, go.Scatter] = {}
    variants: dict[str, go.Scatter] = {}
    for line, each in zip(lines, drawn, strict=True):
        if not each.look:
            continue
        if line.group not in runs:
            style = {"color": each.colour, "width": 4}
            runs[line.group] = _legend_entry(line.group, style, _mark(each.look))
        # Labels are "run · variant"; in this legend the run has an entry of its own.
        style = {"color": GREY, "width": 1.8, "dash": each.dash}
        variants.setdefault(line.variant, _legend_entry(line.variant, style))
    return [*runs.values(), *(entry for name, entry in variants.items() if name)]


def _legend_entry(name: str, style: dict[str, Any], mark: dict[str, Any] | None = None) -> go.Scatter:
    """An entry of the legend without a line of its own."""
    return go.Scatter(
        x=[None],
        y=[None],
        mode="lines+markers" if mark else "lines",
        name=words(name),
        line=style,
        marker=mark,
        legendgroup=name,
        hoverinfo="skip",
    )


def _band(line: Line, colour: str, log_y: bool, opacity: float) -> go.Scatter:
    """Closed outline of the spread; NaN and, on a log axis, values that are not positive are left out."""
    assert line.lower is not None
    assert line.upper is not None
    known = np.isfinite(line.lower) & np.isfinite(line.upper)
    lower = np.where(line.lower > 0, line.lower, np.nan) if log_y else line.lower
    known &= np.isfinite(lower)
    x, low, high = line.x[known], lower[known], line.upper[known]
    # plotly takes the opacity of a fill only as part of its colour.
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
        name=words(f"{line.label} · spread"),
    )


def _shade(drawn: go.Figure, healthy: tuple[float, float], span: tuple[float, float]) -> None:
    """Healthy band below the curves, cut at the ends of the axis."""
    low, high = max(healthy[0], span[0]), min(healthy[1], span[1])
    if low < high:
        drawn.add_hrect(y0=low, y1=high, fillcolor=HEALTHY, line_width=0, layer="below")


def _y_range(figure: Lines) -> tuple[float, float] | None:
    """Ends of the vertical axis: the curves, their bands, and the next thresholds."""
    known = _drawable(figure, "measured", "null")
    if known.size == 0:
        return None
    low, high = visible_limits(float(known.min()), float(known.max()))
    limits = _drawable(figure, "threshold")
    # The next threshold on either side shows how far away it is; those beyond it would flatten the curves.
    above, below = limits[limits > high], limits[limits < low]
    high = float(above.min()) if above.size else high
    low = float(below.max()) if below.size else low
    if figure.log_y:
        # 8 % beyond on either side, of the decades on a log axis. A heuristic of ours.
        margin = (high / low) ** 0.08 if high > low else 2.0
        return low / margin, high * margin
    margin = 0.08 * (high - low) if high > low else 0.1 * abs(high) or 0.5  # a line of zeros has no size
    return low - margin, high + margin


def _drawable(figure: Lines, *roles: str) -> np.ndarray:
    """All values of the lines of some roles that the axis can show."""
    values = figure.numbers(*roles)
    return values[values > 0] if figure.log_y else values


def _scale(span: tuple[float, float] | None, log_y: bool) -> dict[str, Any]:
    """Range and ticks of the vertical axis: decades on a long log axis, round numbers on a short one."""
    if span is None:
        return {"type": "log"} if log_y else {}
    if not log_y:
        return {"range": list(span)}
    ends = [float(np.log10(end)) for end in span]
    return {"range": ends, **log_axis(ends[0], ends[1])}
