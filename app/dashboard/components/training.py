"""What happened at which step of one training or of several? Panels over one axis of steps, and all about one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import streamlit as st

from depthscope.app.dashboard.components.chart import PLOTLY_SOURCE, card, component
from depthscope.app.dashboard.components.finding_card import escaped
from depthscope.app.dashboard.components.microscope import pinned_by_page
from depthscope.app.drawing.plotly.panels import Bar, Panel, draw_panels, panels_height
from depthscope.app.figures import Figure, Heatmap
from depthscope.app.figures.build.history_figure import (
    histories_figure,
    history_figure,
    measure_title,
    profile_figure,
    row_names,
)
from depthscope.app.figures.build.spread import folded
from depthscope.app.readings.first_findings import Begun
from depthscope.app.readings.training_history import Measure, TrainingHistory
from depthscope.app.tables.tables import spoken
from depthscope.app.text.numbers import number
from depthscope.app.text.visible import visible

__all__ = [
    "Shown",
    "default_measures",
    "measures_of",
    "position_of",
    "show_history",
    "show_step",
    "show_step_heading",
    "steps_of",
]

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
"""Findings above the panels; the others are in the list on the right."""

CURVE = 80
CURVE_OF_SEVERAL = 120
CURVES_OF_CELLS = 220
LINE = 13
"""Pixels of a curve, of those of several runs and of all elements of matrices, and of a line of text."""

_panels = component("panels", "plotly_page")


@dataclass(frozen=True)
class Shown:
    """What a visitor has chosen.

    ``measures``: from top to bottom.
    ``choice``: labels of their dims.
    ``zoom``: first and last step.
    ``step``, ``other``: the step that is pinned, and the one that it is compared with; without a pin the last step is shown.
    ``over``: of several runs: which number of the depths of a step is drawn, one of `OVER_ROWS`.
    ``colours``: run to number of its colour.
    ``group_of``: of several runs: the group of each, drawn as one band; empty for single runs.
    """

    measures: tuple[str, ...]
    choice: Mapping[str, str]
    zoom: tuple[float, float] | None
    step: int | None
    other: int | None
    over: str
    colours: Mapping[str, int]
    group_of: Mapping[str, str]


def measures_of(histories: Mapping[str, TrainingHistory]) -> dict[str, Measure]:
    """Everything that a run has numbers of, by name."""
    return {name: measure for history in histories.values() for name, measure in history.measures.items()}


def steps_of(histories: Mapping[str, TrainingHistory]) -> np.ndarray:
    """The steps that a run has measured, increasing."""
    return np.unique(np.concatenate([history.steps for history in histories.values()]))


def default_measures(known: Mapping[str, Measure]) -> list[str]:
    """What is shown at first."""
    return [name for name in DEFAULT_MEASURES if name in known] or list(known)[:3]


def position_of(steps: np.ndarray, step: int | None) -> int:
    """The position of the measured step that is nearest to one; of the last one where none is pinned."""
    if step is None:
        return len(steps) - 1
    return int(np.abs(steps - np.int64(step)).argmin())


def show_history(
    histories: Mapping[str, TrainingHistory],
    shown: Shown,
    begun: Mapping[str, Sequence[Begun]],
    *,
    on_change: object,
) -> None:
    """The panels of one history, or of several on the same axes.

    ``begun``: where the findings of each run began.
    ``on_change``: called when a step is pinned, or a range of steps chosen.
    """
    panels = [_panel(histories, name, shown) for name in shown.measures]
    marks = _marks(histories, begun)
    # Of the panels' own columns, and no others: an arrow key moves to where something else can be seen.
    places = _places(histories, panels)
    pins = pinned_by_page(
        "training", *(None if step is None else float(step) for step in (shown.step, shown.other))
    )
    known = measures_of(histories)
    resumed = next(iter(histories.values())).resumed_at if len(histories) == 1 else ()
    _panels(
        data={
            "name": "training",
            "figure": draw_panels(panels, marks, marks=resumed).to_json(),
            "height": panels_height(panels, marks),
            "places": places,
            "names": None,
            "follows": True,
            **pins,
            "alt": visible(
                f"Panels over {len(steps_of(histories))} steps of the training of {', '.join(histories)}: "
                f"{', '.join(measure_title(known[name]) for name in shown.measures)}. Left and right arrow pin a "
                "step, with shift the one to compare with, escape returns to the last one, enter opens its numbers."
            ),
            "plotly": PLOTLY_SOURCE,
        },
        key="training",
        on_pin_change=on_change,
        on_zoom_change=on_change,
    )


def _marks(histories: Mapping[str, TrainingHistory], begun: Mapping[str, Sequence[Begun]]) -> list[Bar]:
    """The first findings of each run, as many as have room."""
    most = max(1, MOST_MARKS // len(histories))
    return [
        Bar(
            spoken(each.finding.verdict) if len(histories) == 1 else f"{run}: {spoken(each.finding.verdict)}",
            each.finding.severity.name,
            float(each.step),
            float(histories[run].steps[-1]) if each.lasts else each.step,
        )
        for run in histories
        for each in begun[run][:most]
    ][:MOST_MARKS]


def _panel(histories: Mapping[str, TrainingHistory], name: str, shown: Shown) -> Panel:
    if len(histories) > 1:
        figure: Figure = histories_figure(
            histories,
            name,
            shown.choice,
            colours=shown.colours,
            group_of=shown.group_of,
            over=shown.over,
            span=shown.zoom,
        )
        return Panel(figure, height=CURVE_OF_SEVERAL)
    (history,) = histories.values()
    figure = history_figure(history, name, shown.choice, shown.zoom)
    if not isinstance(figure, Heatmap):
        return Panel(figure, height=CURVE if len(figure.lines) == 1 else CURVES_OF_CELLS)
    rows = len(figure.y)
    height = int(np.clip(9 * rows, 90, 300))
    # The first row, the last one, and as many between as have room.
    names = row_names(history.measures[name])
    every = max(1, int(np.ceil(rows * LINE / height)))
    return Panel(figure, height=height, ticks={row: names[row] for row in range(0, rows, every)})


def _places(histories: Mapping[str, TrainingHistory], panels: Sequence[Panel]) -> list[float]:
    columns = next((panel.figure.x for panel in panels if isinstance(panel.figure, Heatmap)), None)
    if columns is None:
        steps = steps_of(histories)
        columns = steps[np.linspace(0, len(steps) - 1, min(len(steps), 400)).astype(int)]
    return [float(step) for step in columns]


def show_step_heading(histories: Mapping[str, TrainingHistory], shown: Shown) -> None:
    """Which step the right column shows."""
    words = f"Step {_spaced(steps_of(histories)[-1] if shown.step is None else shown.step)}"
    if shown.other is not None:
        words += f" against step {_spaced(shown.other)}"
    elif shown.step is None:
        words += ", the last one"
    st.markdown(f"## {words}")


def show_step(histories: Mapping[str, TrainingHistory], shown: Shown) -> None:
    """All about one step, and of a single run about the one that it is compared with."""
    steps = [shown.step] if shown.other is None else [shown.step, shown.other]
    known = measures_of(histories)
    numbers = [name for name in shown.measures if not known[name].rows]
    if len(histories) == 1:
        (history,) = histories.values()
        positions = [position_of(history.steps, step) for step in steps]
        _show_numbers(history, numbers, shown, positions)
        curves = {f"step {_spaced(history.steps[at])}": (history, at) for at in positions}
    else:
        curves = {run: (each, position_of(each.steps, shown.step)) for run, each in histories.items()}
        _show_table(curves, numbers, shown)
    for name in shown.measures:
        having = {label: curve for label, curve in curves.items() if name in curve[0].measures}
        if known[name].rows:
            colours = shown.colours if len(histories) > 1 else None
            figure = profile_figure(name, shown.choice, having, colours)
            card(folded(figure, shown.group_of), key=f"training_{name}", height=210)


def _show_numbers(
    history: TrainingHistory, names: Sequence[str], shown: Shown, positions: Sequence[int]
) -> None:
    if not names:
        return
    with st.container(horizontal=True):
        for name in names:
            values = history.values(name, shown.choice)
            first = float(values[positions[0]])
            change = number(first - float(values[positions[1]])) if len(positions) > 1 else None
            st.metric(
                escaped(measure_title(history.measures[name])),
                number(first, digits=4),
                change,
                delta_color="off",
                width="content",
            )


def _show_table(
    curves: Mapping[str, tuple[TrainingHistory, int]], names: Sequence[str], shown: Shown
) -> None:
    """One row for each run, at its own step that is nearest."""
    rows = []
    for run, (history, at) in curves.items():
        row = {"run": escaped(run), "step": _spaced(history.steps[at])}
        for name in names:
            if name in history.measures:
                title = measure_title(history.measures[name])
                row[title] = number(float(history.values(name, shown.choice)[at]))
        rows.append(row)
    st.table(pd.DataFrame(rows).fillna("–").set_index("run"), border="horizontal")


def _spaced(step: int) -> str:
    return f"{int(step):,}".replace(",", " ")
