"""How are many measurements of one run drawn over one depth axis? As panels, with the findings as bars above them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from depthscope.app.drawing.plotly.cells import draw_heatmap
from depthscope.app.drawing.plotly.colours import FAINT, FONT, GREY
from depthscope.app.drawing.plotly.curves import draw_lines
from depthscope.app.drawing.plotly.labels import words
from depthscope.app.figures import Figure, Lines
from depthscope.app.figures.palette import MARK_EDGE, look_of

__all__ = ["SEVERITY_COLOURS", "Bar", "Panel", "draw_stack", "stack_height"]

SEVERITY_COLOURS = {"FAIL": "#E03131", "WARN": "#E8890C", "INFO": "#5C8FD6"}
"""Of the bars, legible on white and on black; each bar has its words beside it."""

STRIP, LANE, GAP, TOP, BOTTOM = 92, 19, 30, 10, 42
"""Pixels: of a strip of curves, of a finding, between two panels, above all and below all."""


@dataclass(frozen=True)
class Bar:
    """A finding over a range of depths.

    Parameters
    ----------
    label : str
        Its verdict in words.
    severity : str
        A key of `SEVERITY_COLOURS`.
    first, last : int
        Depths, both taken.
    """

    label: str
    severity: str
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Panel:
    """One measurement along depth.

    Parameters
    ----------
    figure : Lines or Heatmap
        What to draw; the axis of depth is its x.
    height : int
        Pixels.
    depths : mapping of float to float, optional
        Position on the figure's own axis → depth, where its axis is another one, such as connections.
    ticks : mapping of int to str, optional
        Rows of a heat map that are named at its side.
    """

    figure: Figure
    height: int = STRIP
    depths: Mapping[float, float] | None = None
    ticks: Mapping[int, str] | None = None


def stack_height(panels: Sequence[Panel], bars: Sequence[Any]) -> int:
    """Pixels of a drawing."""
    return TOP + BOTTOM + LANE * len(bars) + sum(panel.height + GAP for panel in panels)


def draw_stack(panels: Sequence[Panel], bars: Sequence[Bar], names: Sequence[str]) -> go.Figure:
    """Panels over one axis of depth.

    ``bars``: findings, drawn above the panels; their range is shaded in the first panel too.
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
        drawn.add_annotation(
            text=f"<b>{words(panel.figure.title)}</b>",
            **panel_title(high),
        )
        if number == 2:
            drawn.update_layout(shapes=[_shade(bar, low, high) for bar in bars])
        top -= panel.height
    drawn.update_layout(
        **axes,
        xaxis={
            "range": [-0.5, len(names) - 0.5],
            "title": {"text": "depth (0 = embedding)", "standoff": 6},
            "gridcolor": FAINT,
            "zeroline": False,
            "showgrid": False,
            "anchor": "free",
            "position": 0,
        },
        template="none",
        height=total,
        margin={"l": 92, "r": 64, "t": TOP, "b": BOTTOM},
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        font={"family": FONT, "size": 12},
        hovermode="closest",
        showlegend=False,
        uirevision="microscope",
        dragmode="zoom",
    )
    return drawn


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
    """On that side of the bar where there is more room."""
    on_the_left = bar.first > depths - 1 - bar.last
    return {
        "text": words(bar.label),
        "x": bar.first - 0.55 if on_the_left else bar.last + 0.55,
        "xanchor": "right" if on_the_left else "left",
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
    """Where the title of a panel stands.

    ``high``: share of the drawing where the panel ends.
    """
    return {
        "xref": "paper",
        "x": 0,
        "xanchor": "left",
        "yref": "paper",
        "y": high,
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 12},
    }


def add_panel(
    drawn: go.Figure, panel: Panel, number: int, domain: tuple[float, float], axes: dict[str, Any]
) -> None:
    """Draw one panel into its share of a drawing.

    ``domain``: share of the drawing, from and to.
    """
    name = f"y{number}"
    own = draw_lines(panel.figure) if isinstance(panel.figure, Lines) else draw_heatmap(panel.figure)
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
            # Only round numbers: the subdivisions of a decade run into each other.
            axis |= {
                "dtick": max(1, round((high - low) / 3)) if high - low > 1 else "D2",
                "exponentformat": "power",
            }
    else:
        axis |= {"autorange": "reversed", "showgrid": False}
        if panel.ticks:
            axis |= {
                "tickvals": list(panel.ticks),
                "ticktext": [words(name, 14) for name in panel.ticks.values()],
            }
    axes[f"yaxis{number}"] = axis
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


def eigenvalue_plane(eigenvalues: Mapping[str, Sequence[complex]]) -> go.Figure:
    """Eigenvalues in the complex plane, with the unit circle."""
    angle = np.linspace(0, 2 * np.pi, 121)
    drawn = go.Figure(
        go.Scatter(
            x=np.cos(angle),
            y=np.sin(angle),
            mode="lines",
            line={"color": GREY, "dash": "dot", "width": 1.2},
            hoverinfo="skip",
            showlegend=False,
        )
    )
    for number, (name, values) in enumerate(eigenvalues.items()):
        look = look_of(number)
        found = np.asarray(list(values), dtype=complex)
        drawn.add_trace(
            go.Scatter(
                x=found.real,
                y=found.imag,
                mode="markers",
                name=words(name),
                marker={
                    "size": 8,
                    "opacity": 0.75,
                    "symbol": look.shape,
                    "color": look.colour,
                    "line": {"color": MARK_EDGE, "width": 0.7},
                },
                hovertemplate=f"{words(name)}<br>%{{x:.4f}} + %{{y:.4f}} i<extra></extra>",
            )
        )
    axis = {"gridcolor": FAINT, "zeroline": True, "zerolinecolor": FAINT, "tickfont": {"size": 10.5}}
    drawn.update_layout(
        xaxis={**axis, "title": {"text": "real part", "standoff": 4}, "constrain": "domain"},
        yaxis={**axis, "title": {"text": "imaginary part", "standoff": 4}, "scaleanchor": "x"},
        template="none",
        margin={"l": 48, "r": 8, "t": 8, "b": 38},
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        font={"family": FONT, "size": 11.5},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "font": {"size": 10.5}},
        uirevision="eigenvalues",
    )
    return drawn
