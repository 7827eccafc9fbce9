"""How is a training drawn? As panels over one axis of steps, with marks where findings begin and where it was resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from depthscope.app.drawing.plotly.layout import GREY, set_layout, words
from depthscope.app.drawing.plotly.stack import (
    ABOVE,
    BOTTOM,
    GAP,
    LANE,
    SEVERITY_COLOURS,
    TOP,
    Panel,
    add_panel,
    hidden_axis,
    panel_title,
    panels_layout,
    stack_height,
)
from depthscope.app.figures import Heatmap


@dataclass(frozen=True)
class Mark:
    """A finding from the step at which it began.

    ``label``: the name of its verdict.
    ``severity``: a key of `SEVERITY_COLOURS`.
    ``first, last``: steps.
    """

    label: str
    severity: str
    first: float
    last: float


def draw_history(
    panels: Sequence[Panel],
    marks: Sequence[Mark],
    *,
    zoom: tuple[float, float] | None = None,
    resumed: Sequence[float] = (),
) -> go.Figure:
    """Panels over one axis of steps.

    ``zoom``: first and last step that are shown; None for all.
    ``resumed``: steps at which the training went on after an end.
    """
    total = stack_height(panels, marks)
    room = total - TOP - BOTTOM
    drawn = go.Figure()
    top = float(room)
    axes: dict[str, Any] = {}
    if marks:
        first, last = zoom or _ends(panels)
        axes["yaxis"] = hidden_axis((top - LANE * len(marks)) / room, top / room, len(marks))
        for lane, mark in enumerate(marks):
            drawn.add_trace(_bar(mark, lane))
            drawn.add_annotation(**_label(mark, lane, is_late=2 * mark.first > first + last))
        top -= LANE * len(marks)
    for number, panel in enumerate(panels, start=2):
        top -= GAP
        low, high = (top - panel.height) / room, top / room
        add_panel(drawn, panel, number, (low, high), axes)
        drawn.add_annotation(
            text=f"<b>{words(panel.figure.title, 90)}</b>{_note(panel)}", **panel_title(high)
        )
        top -= panel.height
    ends = {"autorange": True} if zoom is None else {"range": list(zoom), "autorange": False}
    has_maps = any(isinstance(panel.figure, Heatmap) for panel in panels)
    layout = panels_layout(total, "step", uirevision="history", bars=has_maps, **ends)
    set_layout(drawn, **axes, **layout, shapes=[_line(step) for step in resumed])
    return drawn


def _ends(panels: Sequence[Panel]) -> tuple[float, float]:
    """First and last step of the panels."""
    figures = [panel.figure for panel in panels]
    steps = [each.x for each in figures if isinstance(each, Heatmap)]
    steps += [line.x for each in figures if not isinstance(each, Heatmap) for line in each.lines]
    known = np.concatenate(steps or [np.zeros(1)])
    return float(known.min()), float(known.max())


def _note(panel: Panel) -> str:
    return (
        f"  <span style='font-size:10.5px'>{words(panel.figure.caption)}</span>"
        if panel.figure.caption
        else ""
    )


def _bar(mark: Mark, lane: int) -> go.Scatter:
    return go.Scatter(
        x=[mark.first, mark.last],
        y=[lane, lane],
        mode="lines+markers",
        line={"color": SEVERITY_COLOURS[mark.severity], "width": 5},
        marker={"symbol": "triangle-right", "size": [11, 0.1]},
        hovertemplate=f"{words(mark.label)}: from step {mark.first:g}<extra></extra>",
    )


def _label(mark: Mark, lane: int, *, is_late: bool) -> dict[str, Any]:
    """Above its bar; of one that begins late on its left side."""
    return {
        "text": words(mark.label),
        "x": mark.first,
        **(
            {"xanchor": "right", "xshift": -8}
            if is_late
            else {"xanchor": "left", "xshift": 4, "yshift": ABOVE}
        ),
        "y": lane,
        "yref": "y",
        "showarrow": False,
        "font": {"size": 10.5},
    }


def _line(step: float) -> dict[str, Any]:
    return {
        "type": "line",
        "xref": "x",
        "x0": step,
        "x1": step,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"color": GREY, "width": 1.2, "dash": "dash"},
        "label": {"text": "resumed", "font": {"size": 10}, "textposition": "end"},
    }
