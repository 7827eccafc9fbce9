"""How are many measurements drawn over one axis of depth or of steps? As panels, with the findings as bars above them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from depthscope.app.drawing.plotly.cells import FAINT, FONT, GREY, draw_heatmap, log_axis, set_layout, words
from depthscope.app.drawing.plotly.curves import draw_lines
from depthscope.app.figures import Figure, Heatmap, Lines
from depthscope.app.figures.specification import NOISE_BASELINE, looks_of

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
    """A finding over a range of depths or steps.

    ``label``: the name of its verdict.
    ``severity``: a key of `SEVERITY_COLOURS`.
    ``first, last``: both taken.
    """

    label: str
    severity: str
    first: float
    last: float


@dataclass(frozen=True, eq=False)
class Panel:
    """One measurement along the axis.

    ``figure``: what to draw; the shared axis is its x.
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


def panels_height(panels: Sequence[Panel], bars: Sequence[Bar]) -> int:
    """Pixels of a drawing."""
    return TOP + BOTTOM + LANE * len(bars) + sum(panel.height + GAP for panel in panels)


def draw_panels(
    panels: Sequence[Panel],
    bars: Sequence[Bar],
    names: Sequence[str] | None = None,
    *,
    marks: Sequence[float] = (),
) -> go.Figure:
    """Panels over one axis.

    ``bars``: findings, drawn above the panels; on an axis of depths their range is shaded in every panel too.
    ``names``: of the depths; None for an axis of steps.
    ``marks``: steps at which a training was resumed.
    """
    total = panels_height(panels, bars)
    room = total - TOP - BOTTOM
    drawn = go.Figure()
    top = float(room)
    axes: dict[str, Any] = {}
    ends = _steps(panels) if names is None else (-0.5, len(names) - 0.5)
    if bars:
        # The axis of the findings above the panels.
        lanes = {"range": [len(bars) - 0.5, -0.5], "visible": False, "fixedrange": True}
        axes["yaxis"] = {**lanes, "domain": [(top - LANE * len(bars)) / room, top / room]}
        drawn.add_traces([_bar(bar, lane, names) for lane, bar in enumerate(bars)])
        drawn.update_layout(annotations=[_bar_label(bar, lane, ends) for lane, bar in enumerate(bars)])
        top -= LANE * len(bars)
    for number, panel in enumerate(panels, start=2):
        top -= GAP
        low, high = (top - panel.height) / room, top / room
        _add_panel(drawn, panel, number, (low, high), axes)
        caption = panel.figure.caption
        note = f"  <span style='font-size:10.5px'>{words(caption)}</span>" if caption else ""
        more = note if names is None else _key(panel)
        drawn.add_annotation(
            text=f"<b>{words(panel.figure.title, 90)}</b>{more}",
            xref="paper",
            x=0,
            xanchor="left",
            # From the left edge of the drawing on: on a phone a title needs the room above the names of the axis too.
            xshift=4 - LEFT,
            yref="paper",
            y=high,
            yanchor="bottom",
            yshift=3,  # above the names of the first row of a map, or of the topmost tick
            showarrow=False,
            font={"size": 12},
        )
        for bar in bars if names is not None and isinstance(panel.figure, Lines) else ():
            drawn.add_shape(
                type="rect",
                xref="x",
                x0=bar.first - 0.4,
                x1=bar.last + 0.4,
                yref="paper",
                y0=low,
                y1=high,
                fillcolor=SEVERITY_COLOURS[bar.severity],
                opacity=0.09,
                line_width=0,
                layer="below",
            )
        if panel.marked is not None:
            drawn.add_hline(y=panel.marked, yref=f"y{number}", line={"color": MARKED, "width": 1.5})
        top -= panel.height
    has_maps = names is not None or any(isinstance(panel.figure, Heatmap) for panel in panels)
    set_layout(
        drawn,
        **axes,
        xaxis={
            **({"autorange": True} if names is None else {"range": list(ends)}),
            "title": {"text": "step" if names is None else "depth (0 = embedding)", "standoff": 6},
            "zeroline": False,
            "showgrid": False,
            "anchor": "free",
            "position": 0,
        },
        template="none",
        height=total,
        margin={"l": LEFT, "r": 64 if has_maps else 16, "t": TOP, "b": BOTTOM},
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        font={"family": FONT, "size": 12},
        hovermode="closest",
        showlegend=False,
        uirevision="panels",
        dragmode="zoom",
    )
    for step in marks:
        label = {"text": "resumed", "font": {"size": 10}, "textposition": "end"}
        line = {"color": GREY, "width": 1.2, "dash": "dash"}
        drawn.add_shape(type="line", x0=step, x1=step, yref="paper", y0=0, y1=1, line=line, label=label)
    return drawn


def _steps(panels: Sequence[Panel]) -> tuple[float, float]:
    """First and last step of the panels."""
    figures = [panel.figure for panel in panels]
    steps = [each.x for each in figures if isinstance(each, Heatmap)]
    steps += [line.x for each in figures if isinstance(each, Lines) for line in each.lines]
    known = np.concatenate(steps or [np.zeros(1)])
    return float(known.min()), float(known.max())


def _bar(bar: Bar, lane: int, names: Sequence[str] | None) -> go.Scatter:
    if names is None:
        place, reach, width = f"from step {bar.first:g}", 0.0, 5
    else:
        first, last = names[int(bar.first)], names[int(bar.last)]
        place = first if bar.first == bar.last else f"{first} to {last}"
        # Half a depth on both sides: a finding at one depth has a width too.
        reach, width = 0.4, 7
    return go.Scatter(
        x=[bar.first - reach, bar.last + reach],
        y=[lane, lane],
        mode="lines+markers" if names is None else "lines",
        line={"color": SEVERITY_COLOURS[bar.severity], "width": width},
        marker={"symbol": "triangle-right", "size": [11, 0.1]} if names is None else None,
        hovertemplate=f"{words(bar.label)}: {words(place)}<extra></extra>",
    )


def _bar_label(bar: Bar, lane: int, ends: tuple[float, float]) -> dict[str, Any]:
    """On that side of the bar where there is more room; above the bar where there is none."""
    before, after = bar.first - ends[0], ends[1] - bar.last
    on_the_left = before > after
    place: dict[str, Any] = {
        "x": bar.first if on_the_left else bar.last,
        "xanchor": "right" if on_the_left else "left",
        "xshift": -8 if on_the_left else 8,
    }
    if max(before, after) < LEAST_ROOM * (ends[1] - ends[0]):
        place = {"xref": "paper", "x": 0, "xanchor": "left", "yshift": ABOVE}
    return {
        "text": words(bar.label),
        **place,
        "y": lane,
        "yref": "y",
        "showarrow": False,
        "font": {"size": 11},
    }


def _key(panel: Panel) -> str:
    """The legend of a panel, in its title: which line is which, where there are several."""
    if not isinstance(panel.figure, Lines):
        return ""
    looks = looks_of(panel.figure)
    lines = [line for line in panel.figure.lines if id(line) in looks]
    names = [line.variant or "raw" for line in lines]
    parts = [
        f'<span style="color: {looks[id(line)].colour}">{"━" if i == 0 else "┅"}</span> {words(name)}'
        for i, (line, name) in enumerate(zip(lines, names, strict=True))
        if len(lines) > 1
    ]
    if any(line.role == "null" for line in panel.figure.lines):
        parts.append(f'<span style="color: {GREY}">╌</span> {NOISE_BASELINE}')
    return "".join(f"   {part}" for part in parts)


def _add_panel(
    drawn: go.Figure, panel: Panel, number: int, domain: tuple[float, float], axes: dict[str, Any]
) -> None:
    """Draw one panel into its share of a drawing.

    ``domain``: share of the drawing, from and to.
    """
    # A tick takes some sixteen pixels.
    ticks = max(3, panel.height // 16)
    figure = panel.figure
    own = draw_lines(figure) if isinstance(figure, Lines) else draw_heatmap(figure, most_ticks=ticks)
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
            axis = log_axis(low, high, most=3) | axis
    else:
        axis |= {"autorange": "reversed", "showgrid": False}
        if panel.ticks:
            names = [words(name, 14) for name in panel.ticks.values()]
            axis |= {"tickvals": list(panel.ticks), "ticktext": names}
    axes[f"yaxis{number}"] = axis
    # Where two versions of a number of one run agree, the first one is seen through the dots of the others.
    of_several_runs = isinstance(panel.figure, Lines) and len(panel.figure.runs) > 1
    marked = [each for each in own.data if each.type == "scatter" and each.mode == "lines+markers"]
    for trace in [] if of_several_runs else marked[1:]:
        trace.line.dash, trace.mode = "dot", "lines"
    for trace in own.data:
        trace.update(yaxis=f"y{number}")
        if trace.type == "heatmap":
            middle = sum(domain) / 2
            trace.colorbar.update(
                y=middle, len=domain[1] - domain[0], thickness=9, x=1.01, tickfont={"size": 10}, title=None
            )
        elif panel.depths is not None and trace.x is not None:
            trace.update(x=[panel.depths.get(float(x), np.nan) for x in trace.x])
        drawn.add_trace(trace)
