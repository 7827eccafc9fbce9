"""What happened at which step of a training? Panels over one axis of steps, and all about one step beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import streamlit as st

from depthscope.app.dashboard.components.chart import PLOTLY_SOURCE, card, component
from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.components.microscope import pinned_by_page
from depthscope.app.drawing.plotly.history import Mark, draw_history
from depthscope.app.drawing.plotly.stack import Panel, stack_height
from depthscope.app.figures import Heatmap
from depthscope.app.figures.build.history_figure import (
    history_figure,
    measure_title,
    profile_figure,
    row_names,
)
from depthscope.app.readings.first_findings import Begun
from depthscope.app.readings.training_history import TrainingHistory
from depthscope.app.tables.tables import spoken
from depthscope.app.text.visible import visible

__all__ = ["Shown", "default_measures", "position_of", "show_history", "show_step", "show_step_heading"]

DEFAULT_MEASURES = (
    "loss",
    "learning_rate",
    "effective_rank",
    "residual_norm",
    "gradient_norm",
    "composite_gain",
    "update_ratio",
)
"""Shown where the run has them, from top to bottom."""

MOST_MARKS = 6
"""Findings above the panels; the others are in the list beside them."""

CURVE = 80
LINE = 13
"""Pixels of a curve, and of a line of text."""

_panels = component("panels", "plotly_page")


@dataclass(frozen=True)
class Shown:
    """What a visitor has chosen.

    Parameters
    ----------
    measures : tuple of str
        From top to bottom.
    choice : mapping of str to str
        Labels of their dims.
    zoom : tuple of float or None
        First and last step.
    step, other : int or None
        The step that is pinned, and the one that it is compared with; without a pin the last step is shown.
    """

    measures: tuple[str, ...]
    choice: Mapping[str, str]
    zoom: tuple[float, float] | None
    step: int | None
    other: int | None


def default_measures(history: TrainingHistory) -> list[str]:
    """What is shown at first."""
    known = history.measures
    return [name for name in DEFAULT_MEASURES if name in known] or list(known)[:3]


def position_of(history: TrainingHistory, step: int | None) -> int:
    """The measured step that is nearest to one; the last one where none is pinned."""
    if step is None:
        return len(history.steps) - 1
    return int(np.abs(history.steps - np.int64(step)).argmin())


def show_history(
    history: TrainingHistory, shown: Shown, begun: Sequence[Begun], *, on_change: object
) -> None:
    """The panels of a history.

    ``on_change``: called when a step is pinned, or a range of steps chosen.
    """
    panels = [_panel(history, name, shown) for name in shown.measures]
    last = float(history.steps[-1])
    marks = [
        Mark(
            spoken(each.finding.verdict),
            each.finding.severity.name,
            float(each.step),
            last if each.lasts else each.step,
        )
        for each in begun[:MOST_MARKS]
    ]
    # Of the panels' own columns, and no others: an arrow key moves to where something else can be seen.
    places = _places(history, panels)
    told = pinned_by_page(
        "training", *(None if step is None else float(step) for step in (shown.step, shown.other))
    )
    _panels(
        data={
            "name": "training",
            "figure": draw_history(panels, marks, resumed=history.resumed_at).to_json(),
            "height": stack_height(panels, marks),
            "places": places,
            "names": None,
            "follows": True,
            **told,
            "alt": visible(
                f"Panels over {len(history.steps)} steps of the training of {history.name}: "
                f"{', '.join(measure_title(history.measures[name]) for name in shown.measures)}. Left and right arrow pin a "
                "step, with shift the one to compare with, escape goes back to the last one, enter opens the numbers beside."
            ),
            "plotly": PLOTLY_SOURCE,
        },
        key="training",
        on_pin_change=on_change,
        on_zoom_change=on_change,
    )


def _panel(history: TrainingHistory, name: str, shown: Shown) -> Panel:
    figure = history_figure(history, name, shown.choice, shown.zoom)
    if not isinstance(figure, Heatmap):
        return Panel(figure, height=CURVE)
    rows = len(figure.y)
    height = int(np.clip(9 * rows, 90, 300))
    # The first row, the last one, and as many between as have room.
    names = row_names(history.measures[name])
    every = max(1, int(np.ceil(rows * LINE / height)))
    return Panel(figure, height=height, ticks={row: names[row] for row in range(0, rows, every)})


def _places(history: TrainingHistory, panels: Sequence[Panel]) -> list[float]:
    columns = next((panel.figure.x for panel in panels if isinstance(panel.figure, Heatmap)), None)
    if columns is None:
        steps = history.steps
        columns = steps[np.linspace(0, len(steps) - 1, min(len(steps), 400)).astype(int)]
    return [float(step) for step in columns]


def show_step_heading(history: TrainingHistory, shown: Shown) -> None:
    """Which step is shown beside the panels."""
    first, *others = _positions(history, shown)
    words = f"Step {_spaced(history.steps[first])}"
    if others:
        words += f" against step {_spaced(history.steps[others[0]])}"
    elif shown.step is None:
        words += ", the last one"
    st.markdown(f"## {words}")


def _positions(history: TrainingHistory, shown: Shown) -> list[int]:
    steps = [shown.step] if shown.other is None else [shown.step, shown.other]
    return [position_of(history, step) for step in steps]


def show_step(history: TrainingHistory, shown: Shown) -> None:
    """All about one step, and the one that it is compared with."""
    positions = _positions(history, shown)
    numbers = [name for name in shown.measures if not history.measures[name].rows]
    if numbers:
        with st.container(horizontal=True):
            for name in numbers:
                values = history.values(name, shown.choice)
                first = float(values[positions[0]])
                change = f"{first - float(values[positions[1]]):.3g}" if len(positions) > 1 else None
                st.metric(
                    escaped(measure_title(history.measures[name])),
                    f"{first:.4g}",
                    change,
                    delta_color="off",
                    width="content",
                )
    for name in shown.measures:
        if history.measures[name].rows:
            card(profile_figure(history, name, shown.choice, positions), key=f"training_{name}", height=190)


def _spaced(step: int) -> str:
    return f"{int(step):,}".replace(",", " ")
