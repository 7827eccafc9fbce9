"""What happened at which step of a training, and at which depth? Followed while another process writes it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import streamlit as st

from depthscope.app.dashboard.components.chart import PLOTLY_SOURCE, card, component, show_legend
from depthscope.app.dashboard.components.controls import CONTROLS, choose_group, choose_names, choose_one
from depthscope.app.dashboard.components.finding_card import BADGES, escaped
from depthscope.app.dashboard.components.microscope import pinned_by_page
from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.state import growing_runs
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns, a_click_leads_on, open_microscope
from depthscope.app.dashboard.state.growing_runs import live_state
from depthscope.app.dashboard.state.run_reading import UnreadableRun
from depthscope.app.drawing.plotly.panels import Bar, Panel, draw_panels, panels_height
from depthscope.app.figures import Figure, Heatmap
from depthscope.app.figures.build.history_figure import (
    histories_figure,
    history_figure,
    measure_title,
    profile_figure,
    row_names,
)
from depthscope.app.figures.build.values import folded, folded_colours
from depthscope.app.figures.palette import colour_numbers
from depthscope.app.readings.readings import Reading
from depthscope.app.readings.training_history import Begun, Measure, TrainingHistory
from depthscope.app.tables.tables import spoken
from depthscope.app.text.numbers import number
from depthscope.app.text.visible import visible
from depthscope.diagnostics.verdicts.causes import worst_depth

MOST_MEASURES = 10
"""Panels below each other. A heuristic of ours."""


LARGEST_STEP = 10**15

ZOOM = r"(-?\d{1,15}(?:\.\d{1,9})?),(-?\d{1,15}(?:\.\d{1,9})?)"
"""Two numbers."""


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
LINE = 13
"""Pixels of a curve, of those of several runs, and of a line of text."""

TOGETHER = "all together"

_panels = component("panels", "plotly_page")


@dataclass(frozen=True)
class Shown:
    """What a visitor has chosen.

    ``known``: every measure that a run has, by name; ``measures``: those shown, from top to bottom.
    ``choice``: labels of their dims.
    ``steps``: all that a run has measured, increasing.
    ``zoom``: first and last step.
    ``step``: the one that is pinned, which is shown beside the last one; None where none is.
    ``colours``: run to number of its colour.
    ``group_of``: of several runs: the group of each, drawn as one band; empty for single runs.
    """

    known: Mapping[str, Measure]
    measures: tuple[str, ...]
    choice: Mapping[str, str]
    steps: np.ndarray
    zoom: tuple[float, float] | None
    step: int | None
    colours: Mapping[str, int]
    group_of: Mapping[str, str]


def _show(chosen: ChosenRuns) -> None:
    found = {name: growing_runs.history_of(reading) for name, reading in chosen.readings.items()}
    histories = {
        name: each
        for name, each in found.items()
        if (isinstance(each, TrainingHistory) and len(each.steps) >= 2 and bool(each.measures))
    }
    without = [name for name in found if name not in histories]
    names = [*([TOGETHER] if len(histories) > 1 else []), *histories, *without]
    group_of: dict[str, str] = {}
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = choose_one("Run", names, "trained", width=320)
        readings = [chosen.readings[each] for each in (histories if name == TOGETHER else [name])]
        if name == TOGETHER:
            _, group_of = choose_group(readings, "Seeds", "training_by")
    if name != TOGETHER and name not in histories:
        _explain_none(found[name])
        return
    if name == TOGETHER and without:
        st.caption(f"Without a history, and not shown: {escaped(', '.join(without))}.")
    colours = colour_numbers(chosen.analyses)
    if name == TOGETHER:
        shown = {run: colours[run] for run in histories}
        show_legend(folded_colours(shown, group_of))
    follows = any(_goes_on(histories[reading.name]) for reading in readings)
    st.fragment(_follow, run_every=1.0 if follows else None)(readings, colours, group_of, follows)


def _goes_on(history: TrainingHistory) -> bool:
    """Whether steps are added."""
    return history.status is not None and live_state(history.status).is_growing


def _explain_none(history: TrainingHistory | UnreadableRun) -> None:
    if isinstance(history, UnreadableRun):
        st.warning(f"{escaped(history.name)} cannot be read: {escaped(history.reason)}")
        return
    count = len(history.steps)
    steps = "one measured step" if count == 1 else "no measured steps"
    st.info(
        f"{escaped(history.name)} has {steps}; a history has two or more, and is recorded while a model trains:",
        icon="ℹ️",
    )
    st.code(
        'with ds.record(model, every=50, metrics="live", store="runs/a", optimizer=optimizer) as recorder:\n'
        "    ...\n    recorder.step(loss)",
        "python",
        wrap_lines=True,
    )


def _follow(
    readings: Sequence[Reading], colours: Mapping[str, int], group_of: Mapping[str, str], followed: bool
) -> None:
    if a_click_leads_on():
        st.rerun()  # of the whole page, which goes there
    histories: dict[str, TrainingHistory] = {}
    for reading in readings:
        history = growing_runs.history_of(reading)
        if isinstance(history, UnreadableRun):
            st.warning(f"{escaped(history.name)} cannot be read any more: {escaped(history.reason)}")
            return
        histories[reading.name] = history
    begun = {run: history.begun() for run, history in histories.items()}
    _say(histories)
    shown = _choose(histories, colours, group_of)
    left_column, right = st.columns([3, 2], gap="medium")
    with left_column:
        _show_history(histories, shown, begun)
        st.caption(
            "Click or ←/→ pins a step, escape returns to the last one, dragging zooms in, a double click shows all. "
            'Findings by step are those that a recording with `metrics="live"` or a history of checkpoints stored.'
        )
    with right, st.container(key="training_detail"):
        at = f"Step {_spaced(shown.steps[-1] if shown.step is None else shown.step)}"
        st.markdown(f"## {at}{', the last one' if shown.step is None else ''}")
        for reading in readings:
            _list_findings(reading, begun[reading.name], several=len(readings) > 1)
        _show_step(histories, shown)
    if followed and not any(map(_goes_on, histories.values())):
        st.rerun()  # of the whole page: this stops the fragment's clock


def _say(histories: Mapping[str, TrainingHistory]) -> None:
    """Whether each run goes on, and of a single one what its history is."""
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        for run, history in histories.items():
            if history.status is not None:
                state = live_state(history.status)
                words = state.words if len(histories) == 1 else f"{escaped(run)}: {state.words}"
                st.badge(words, color=state.colour)
        if len(histories) == 1:
            (history,) = histories.values()
            facts = [f"{len(history.steps)} measured steps"]
            if status := history.status:
                facts.append(f"written by process {status.pid} on {status.host}")
            if history.resumed_at:
                facts.append(f"resumed at step {', '.join(map(str, history.resumed_at[-3:]))}")
            st.caption(escaped(", ".join(facts)), width="content")


def _choose(
    histories: Mapping[str, TrainingHistory], colours: Mapping[str, int], group_of: Mapping[str, str]
) -> Shown:
    known = {name: each for history in histories.values() for name, each in history.measures.items()}
    with st.container(horizontal=True, vertical_alignment="bottom"):
        with st.popover("Measures", type="tertiary"):
            measures = choose_names(
                "Measures",
                list(known),
                [name for name in DEFAULT_MEASURES if name in known] or list(known)[:3],
                key="measures",
                words={name: measure_title(measure) for name, measure in known.items()},
                most=MOST_MEASURES,
            )
        dims: dict[str, list[str]] = {}
        for name in measures:
            for dim, labels in known[name].choices.items():
                if len(labels) > 1:
                    dims.setdefault(dim, []).extend(
                        label for label in labels if label not in dims.get(dim, ())
                    )
        preferred = {
            dim: label for name in reversed(measures) for dim, label in known[name].labels({}).items()
        }
        choice = {
            dim: choose_one(
                CONTROLS[dim].label if dim in CONTROLS else spoken(dim).capitalize(),
                labels,
                f"training_{dim}",
                default=preferred[dim],
                width=130,
            )
            for dim, labels in dims.items()
        }
    steps = np.unique(np.concatenate([history.steps for history in histories.values()]))
    zoom = _zoom(float(steps[0]), float(steps[-1]))
    pinned = None
    if re.fullmatch(r"[0-9]{1,15}", text := st.query_params.get("step", ""), re.ASCII):
        pinned = int(steps[_position_of(steps, int(text))])
    else:
        st.query_params.pop("step", None)
    return Shown(known, tuple(measures), choice, steps, zoom, pinned, colours, group_of)


def _zoom(first: float, last: float) -> tuple[float, float] | None:
    """The steps that are looked at, as the panels say them or the address has them; None where they are none of the run."""
    own = st.session_state.get("training", {})
    if "zoom" in own:  # since this page was opened
        ends = own["zoom"]
    else:
        ends = re.fullmatch(ZOOM, st.query_params.get("zoom_training", ""), re.ASCII)
        ends = ends and ends.groups()
    if not ends:
        return None
    low, high = sorted(map(float, ends))
    return (low, high) if low < last and high > first else None


def _changed() -> None:
    """Put what was pinned into the URL, before the page is drawn anew."""
    pinned = st.session_state["training"].get("pin") or {}
    step = pinned.get("depth")
    if isinstance(step, (int, float)) and 0 <= step < LARGEST_STEP:
        st.query_params["step"] = str(round(step))
    elif pinned:
        st.query_params.pop("step", None)


def _position_of(steps: np.ndarray, step: int | None) -> int:
    """The position of the measured step that is nearest to one; of the last one where none is pinned."""
    if step is None:
        return len(steps) - 1
    return int(np.abs(steps - np.int64(step)).argmin())


def _show_history(
    histories: Mapping[str, TrainingHistory], shown: Shown, begun: Mapping[str, Sequence[Begun]]
) -> None:
    """The panels of one history, or of several on the same axes."""
    panels = [_panel(histories, name, shown) for name in shown.measures]
    marks = _marks(histories, begun)
    # Of the panels' own columns, and no others: an arrow key moves to where something else can be seen.
    places = next((panel.figure.x for panel in panels if isinstance(panel.figure, Heatmap)), None)
    if places is None:
        places = shown.steps[np.linspace(0, len(shown.steps) - 1, min(len(shown.steps), 400)).astype(int)]
    resumed = next(iter(histories.values())).resumed_at if len(histories) == 1 else ()
    _panels(
        data={
            "name": "training",
            "figure": draw_panels(panels, marks, marks=resumed).to_json(),
            "height": panels_height(panels, marks),
            "places": [float(step) for step in places],
            "names": None,
            "follows": True,
            "pin": pinned_by_page("training", None if shown.step is None else float(shown.step)),
            "alt": visible(
                f"Panels over {len(shown.steps)} steps of the training of {', '.join(histories)}: "
                f"{', '.join(measure_title(shown.known[name]) for name in shown.measures)}. Left and right arrow pin a "
                "step, escape returns to the last one, enter opens its numbers."
            ),
            "plotly": PLOTLY_SOURCE,
        },
        key="training",
        on_pin_change=_changed,
        on_zoom_change=_changed,
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
            histories, name, shown.choice, colours=shown.colours, group_of=shown.group_of, span=shown.zoom
        )
        return Panel(figure, height=CURVE_OF_SEVERAL)
    (history,) = histories.values()
    figure = history_figure(history, name, shown.choice, shown.zoom)
    if not isinstance(figure, Heatmap):
        return Panel(figure, height=CURVE)
    rows = len(figure.y)
    height = int(np.clip(9 * rows, 90, 300))
    # The first row, the last one, and as many between as have room.
    names = row_names(history.measures[name])
    every = max(1, int(np.ceil(rows * LINE / height)))
    return Panel(figure, height=height, ticks={row: names[row] for row in range(0, rows, every)})


def _show_step(histories: Mapping[str, TrainingHistory], shown: Shown) -> None:
    """All about one step, and of a single run about the last one too."""
    several = len(histories) > 1
    steps = [shown.step] if several or shown.step is None else [shown.step, None]
    curves = {
        run if several else f"step {_spaced(history.steps[at])}": (history, at)
        for run, history in histories.items()
        for at in (_position_of(history.steps, step) for step in steps)
    }
    _show_numbers(curves, shown, several=several)
    for name in shown.measures:
        having = {label: curve for label, curve in curves.items() if name in curve[0].measures}
        if shown.known[name].rows:
            figure = profile_figure(name, shown.choice, having, shown.colours if several else None)
            card(folded(figure, shown.group_of), key=f"training_{name}", height=210)


def _show_numbers(curves: Mapping[str, tuple[TrainingHistory, int]], shown: Shown, *, several: bool) -> None:
    """One row for each run at its own step that is nearest, or for each step of a single one."""
    names = [name for name in shown.measures if not shown.known[name].rows]
    rows = {
        escaped(label): ({"step": _spaced(history.steps[at])} if several else {})
        | {
            escaped(measure_title(history.measures[name])): number(
                float(history.values(name, shown.choice)[at]), digits=4
            )
            for name in names
            if name in history.measures
        }
        for label, (history, at) in curves.items()
    }
    if names:
        st.table(pd.DataFrame(rows).T.fillna("–"), border="horizontal")


def _spaced(step: int) -> str:
    return f"{int(step):,}".replace(",", " ")


def _list_findings(reading: Reading, begun: Sequence[Begun], *, several: bool) -> None:
    """Where each finding began: a click pins the step, or opens the microscope."""
    if not begun:
        return
    count = "one finding" if len(begun) == 1 else f"{len(begun)} findings"
    of = f"{escaped(reading.name)}: " if several else ""
    with st.expander(f"{of}{count}, from step {begun[0].step} on"):
        for number, each in enumerate(begun):
            finding = each.finding
            sign = BADGES[finding.severity.name][2]
            st.markdown(
                f"{sign} **{escaped(spoken(finding.verdict))}** from step {each.step}"
                f"{'' if each.lasts else ', not at the last step'}"
            )
            with st.container(horizontal=True, gap="small"):
                st.button(
                    "Pin the step",
                    key=f"begun_{reading.name}_{number}",
                    on_click=st.query_params.update,
                    args=({"step": str(each.step)},),
                    type="tertiary",
                )
                st.button(
                    "Open the microscope",
                    key=f"microscope_{reading.name}_{number}",
                    on_click=open_microscope,
                    args=(st.session_state.get("runs", ()),),
                    kwargs={"look_at": reading.name, "depth": worst_depth(finding, reading.analysis)},
                    type="tertiary",
                    help="At the last state of the run.",
                )


PAGE = Page(
    title="Training",
    url_path="training",
    help="At which step of the training, and at which depth, does what change?",
    show=_show,
    of_training=True,
)
