"""How are many measurements of one run drawn over one depth axis? As panels, with the findings as bars above them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from depthscope.app.drawing.plotly.cells import draw_heatmap
from depthscope.app.drawing.plotly.curves import draw_lines
from depthscope.app.drawing.plotly.layout import FAINT, FONT, GREY, log_ticks, set_layout, words
from depthscope.app.figures import Figure, Lines
from depthscope.app.figures.line_looks import looks_of
from depthscope.app.figures.specification import NOISE_BASELINE

SEVERITY_COLOURS = {"FAIL": "#E03131", "WARN": "#E8890C", "INFO": "#5C8FD6"}
"""Of the bars, legible on white and on black; each bar has its words next to it."""

MARKED = "#EE6677"
"""Of what the visitor has marked."""

STRIP, LANE, GAP, TOP, BOTTOM = 92, 21, 30, 10, 42
"""Pixels: of a strip of curves, of a finding, between two panels, above all and below all."""


LEFT = 92
"""Pixels on the left of the panels, for the names of their axes."""

ABOVE = 9
"""Pixels from the middle of a bar to that of its name above it."""

LEAST_ROOM = 0.25
"""Of the axis, for the name of a finding on a side of its bar."""


@dataclass(frozen=True)
class Bar:
    """A finding over a range of depths.

    ``label``: the name of its verdict.
    ``severity``: a key of `SEVERITY_COLOURS`.
    ``first, last``: depths, both taken.
    """

    label: str
    severity: str
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Panel:
    """One measurement along depth.

    ``figure``: what to draw; the axis of depth is its x.
    ``height``: pixels.
    ``depths``: position on the figure's own axis → depth, where its axis is another one, such as connections.
    ``ticks``: rows of a heat map that are named at its side.
    ``marked``: a row of a heat map with a line along it.
    """

    figure: Figure
    height: int = STRIP
    depths: Mapping[float, float] | None = None
    ticks: Mapping[int, str] | None = None
    marked: int | None = None


def stack_height(panels: Sequence[Panel], bars: Sequence[Any]) -> int:
    """Pixels of a drawing."""
    return TOP + BOTTOM + LANE * len(bars) + sum(panel.height + GAP for panel in panels)


def draw_stack(panels: Sequence[Panel], bars: Sequence[Bar], names: Sequence[str]) -> go.Figure:
    """Panels over one axis of depth.

    ``bars``: findings, drawn above the panels; their range is shaded in every panel too.
    """
    total = stack_height(panels, bars)
    room = total - TOP - BOTTOM
    drawn = go.Figure()
    top = room
    axes: dict[str, Any] = {}
    if bars:
        axes["yaxis"] = hidden_axis((top - LANE * len(bars)) / room, top / room, len(bars))
        drawn.add_traces([_bar(bar, lane, names) for lane, bar in enumerate(bars)])
        drawn.update_layout(annotations=[_bar_label(bar, lane, len(names)) for lane, bar in enumerate(bars)])
        top -= LANE * len(bars)
    for number, panel in enumerate(panels, start=2):
        top -= GAP
        low, high = (top - panel.height) / room, top / room
        add_panel(drawn, panel, number, (low, high), axes)
        drawn.add_annotation(text=f"<b>{words(panel.figure.title, 90)}</b>{_key(panel)}", **panel_title(high))
        for bar in bars if isinstance(panel.figure, Lines) else ():
            drawn.add_shape(_shade(bar, low, high))
        if panel.marked is not None:
            drawn.add_hline(y=panel.marked, yref=f"y{number}", line={"color": MARKED, "width": 1.5})
        top -= panel.height
    ends = [-0.5, len(names) - 0.5]
    set_layout(
        drawn, **axes, **panels_layout(total, "depth (0 = embedding)", uirevision="microscope", range=ends)
    )
    return drawn


def panels_layout(
    height: int, title: str, *, uirevision: str, bars: bool = True, **axis: Any
) -> dict[str, Any]:
    """Options of a drawing of panels over one axis.

    ``bars``: with room on the right for the colour bars of maps.
    ``axis``: further options of the shared axis.
    """
    return {
        "xaxis": {
            **axis,
            "title": {"text": title, "standoff": 6},
            "zeroline": False,
            "showgrid": False,
            "anchor": "free",
            "position": 0,
        },
        "template": "none",
        "height": height,
        "margin": {"l": LEFT, "r": 64 if bars else 16, "t": TOP, "b": BOTTOM},
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "font": {"family": FONT, "size": 12},
        "hovermode": "closest",
        "showlegend": False,
        "uirevision": uirevision,
        "dragmode": "zoom",
    }


def hidden_axis(low: float, high: float, lanes: int) -> dict[str, Any]:
    """The axis of the findings above the panels.

    ``low, high``: share of the drawing where it begins and ends.
    """
    return {"domain": [low, high], "range": [lanes - 0.5, -0.5], "visible": False, "fixedrange": True}


def _bar(bar: Bar, lane: int, names: Sequence[str]) -> go.Scatter:
    place = names[bar.first] if bar.first == bar.last else f"{names[bar.first]} to {names[bar.last]}"
    return go.Scatter(
        # Half a depth on both sides: a finding at one depth has a width too.
        x=[bar.first - 0.4, bar.last + 0.4],
        y=[lane, lane],
        mode="lines",
        line={"color": SEVERITY_COLOURS[bar.severity], "width": 7},
        hovertemplate=f"{words(bar.label)}: {words(place)}<extra></extra>",
    )


def _bar_label(bar: Bar, lane: int, depths: int) -> dict[str, Any]:
    """On that side of the bar where there is more room; above the bar where there is none."""
    before, after = bar.first, depths - 1 - bar.last
    on_the_left = before > after
    place: dict[str, Any] = {
        "x": bar.first - 0.55 if on_the_left else bar.last + 0.55,
        "xanchor": "right" if on_the_left else "left",
    }
    if max(before, after) < LEAST_ROOM * depths:
        place = {"xref": "paper", "x": 0, "xanchor": "left", "yshift": ABOVE}
    return {
        "text": words(bar.label),
        **place,
        "y": lane,
        "yref": "y",
        "showarrow": False,
        "font": {"size": 11},
    }


def _shade(bar: Bar, low: float, high: float) -> dict[str, Any]:
    return {
        "type": "rect",
        "xref": "x",
        "x0": bar.first - 0.4,
        "x1": bar.last + 0.4,
        "yref": "paper",
        "y0": low,
        "y1": high,
        "fillcolor": SEVERITY_COLOURS[bar.severity],
        "opacity": 0.09,
        "line": {"width": 0},
        "layer": "below",
    }


def panel_title(high: float) -> dict[str, Any]:
    """Where the title of a panel is placed.

    ``high``: share of the drawing where the panel ends.
    """
    return {
        "xref": "paper",
        "x": 0,
        "xanchor": "left",
        # From the left edge of the drawing on: on a phone a title needs the room above the names of the axis too.
        "xshift": 4 - LEFT,
        "yref": "paper",
        "y": high,
        "yanchor": "bottom",
        "yshift": 3,  # above the names of the first row of a map, or of the topmost tick
        "showarrow": False,
        "font": {"size": 12},
    }


def _key(panel: Panel) -> str:
    """The legend of a panel, in its title: which line is which, where there are several."""
    if not isinstance(panel.figure, Lines):
        return ""
    looks = looks_of(panel.figure)
    lines = [line for line in panel.figure.lines if id(line) in looks]
    names = [line.label.removeprefix(line.group).removeprefix(" · ") or "raw" for line in lines]
    parts = [
        f'<span style="color: {looks[id(line)].colour}">{"━" if i == 0 else "┅"}</span> {words(name)}'
        for i, (line, name) in enumerate(zip(lines, names, strict=True))
        if len(lines) > 1
    ]
    if any(line.role == "null" for line in panel.figure.lines):
        parts.append(f'<span style="color: {GREY}">╌</span> {NOISE_BASELINE}')
    return "".join(f"   {part}" for part in parts)


def add_panel(
    drawn: go.Figure, panel: Panel, number: int, domain: tuple[float, float], axes: dict[str, Any]
) -> None:
    """Draw one panel into its share of a drawing.

    ``domain``: share of the drawing, from and to.
    """
    name = f"y{number}"
    own = (
        draw_lines(panel.figure)
        if isinstance(panel.figure, Lines)
        # A tick takes some sixteen pixels.
        else draw_heatmap(panel.figure, most_ticks=max(3, panel.height // 16))
    )
    axis: dict[str, Any] = {
        "domain": list(domain),
        "gridcolor": FAINT,
        "zeroline": False,
        "nticks": 5,
        "tickfont": {"size": 10.5},
        "automargin": False,
        "fixedrange": True,  # a zoom is one of depth, in all panels
    }
    if isinstance(panel.figure, Lines):
        scale = own.layout.yaxis.to_plotly_json()
        axis |= {key: scale[key] for key in ("type", "range") if key in scale}
        if axis.get("type") == "log":
            low, high = axis.get("range", (0, 2))
            few = high - low <= 2
            axis |= {"exponentformat": "power"} | (
                log_ticks(low, high, most=3) if few else {"dtick": max(1, round((high - low) / 3))}
            )
    else:
        axis |= {"autorange": "reversed", "showgrid": False}
        if panel.ticks:
            axis |= {
                "tickvals": list(panel.ticks),
                "ticktext": [words(name, 14) for name in panel.ticks.values()],
            }
    axes[f"yaxis{number}"] = axis
    # Where two versions of a number of one run agree, the first one is seen through the dots of the others.
    of_several_runs = isinstance(panel.figure, Lines) and len(panel.figure.runs) > 1
    marked = [each for each in own.data if each.type == "scatter" and each.mode == "lines+markers"]
    for trace in [] if of_several_runs else marked[1:]:
        trace.line.dash, trace.mode = "dot", "lines"
    for trace in own.data:
        trace.update(yaxis=name)
        if trace.type == "heatmap":
            middle = sum(domain) / 2
            trace.colorbar.update(
                y=middle, len=domain[1] - domain[0], thickness=9, x=1.01, tickfont={"size": 10}, title=None
            )
        elif panel.depths is not None and trace.x is not None:
            trace.update(x=[panel.depths.get(float(x), np.nan) for x in trace.x])
        drawn.add_trace(trace)
