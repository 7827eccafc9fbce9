"""What happened at which step of a training, and at which depth? Followed while another process writes it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import streamlit as st

from depthscope.app.dashboard.components.controls import CONTROLS
from depthscope.app.dashboard.components.finding_card import BADGES
from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.components.training import (
    Shown,
    default_measures,
    position_of,
    show_history,
    show_step,
    show_step_heading,
)
from depthscope.app.dashboard.state import growing_runs
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.dashboard.state.live_status import LiveState, live_state
from depthscope.app.dashboard.state.named_in_url import choose_names
from depthscope.app.dashboard.state.run_reading import UnreadableRun
from depthscope.app.dashboard.state.visits import a_click_leads_on, open_microscope
from depthscope.app.figures.build.history_figure import measure_title
from depthscope.app.readings.first_findings import Begun
from depthscope.app.readings.readings import Reading
from depthscope.app.readings.training_history import TrainingHistory, UntilStep
from depthscope.app.tables.tables import spoken
from depthscope.diagnostics.verdicts.causes import worst_depth

MOST_MEASURES = 10
"""Panels below each other. A heuristic of ours."""

JUDGING_SECONDS = 0.25
"""Of each second, while steps are left to judge."""

LARGEST_STEP = 10**15

ZOOM = r"(-?\d{1,15}(?:\.\d{1,9})?),(-?\d{1,15}(?:\.\d{1,9})?)"
"""Two numbers."""


def _show(chosen: ChosenRuns) -> None:
    names = list(chosen.readings)
    if st.session_state.get("trained") not in names:  # a name of another folder, or of a link
        st.session_state.pop("trained", None)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = (
            names[0]
            if len(names) == 1
            else st.selectbox("Run", names, key="trained", bind="query-params", width=320)
        )
        paused = st.toggle("Pause", key="paused", help="The page stays as it is while the run goes on.")
        if not paused:
            st.session_state.pop("paused_at", None)
    reading = chosen.readings[name]
    history = growing_runs.history_of(reading)
    if isinstance(history, UnreadableRun):
        st.warning(f"{escaped(history.name)} cannot be read: {escaped(history.reason)}")
        return
    if len(history.steps) < 2 or not history.measures:
        _explain_none(history)
        return
    state = None if history.status is None else live_state(history.status, history.times)
    findings = growing_runs.first_findings_of(history)
    follows = not paused and ((state is not None and state.is_growing) or findings.look(0.0))
    st.fragment(_follow, run_every=1.0 if follows else None)(reading, paused, follows)


def _explain_none(history: TrainingHistory) -> None:
    count = len(history.steps)
    st.info(
        f"{escaped(history.name)} has {'one measured step' if count == 1 else 'no measured steps'}: a history is recorded "
        "while a model trains.",
        icon="ℹ️",
    )
    st.code(
        'with ds.record(model, every=50, metrics="live", store="runs/a", optimizer=optimizer) as recorder:\n'
        "    ...\n    recorder.step(loss)",
        "python",
    )


def _follow(reading: Reading, paused: bool, followed: bool) -> None:
    if a_click_leads_on():
        st.rerun()  # of the whole page, which goes there
    history = growing_runs.history_of(reading)
    if isinstance(history, UnreadableRun):
        st.warning(f"{escaped(history.name)} cannot be read any more: {escaped(history.reason)}")
        return
    state = None if history.status is None else live_state(history.status, history.times)
    findings = growing_runs.first_findings_of(history)
    left = findings.look(JUDGING_SECONDS)
    _say(history, state, paused)
    seen = _as_paused(history) if paused else history
    shown = _choose(seen)
    left_column, right = st.columns([3, 2], gap="medium")
    with left_column:
        show_history(seen, shown, findings.begun(), on_change=_changed)
        st.caption(
            "Click or ←/→ pins a step, shift-click compares it with another, dragging zooms in, a double click shows all. "
            f"Verdicts judged {findings.num_judged} of {len(history.steps)} steps{', and go on' if left else ''}."
        )
    with right, st.container(key="training_detail"):
        show_step_heading(seen, shown)
        _list_findings(reading, findings.begun())
        show_step(seen, shown)
    if followed and not left and not (state is not None and state.is_growing):
        st.rerun()  # of the whole page: this stops the fragment's clock


def _as_paused(history: TrainingHistory) -> TrainingHistory:
    """The history up to the step that was the last one when the visitor paused it."""
    at = st.session_state.setdefault("paused_at", int(history.steps[-1]))
    return UntilStep(history, at)


def _say(history: TrainingHistory, state: LiveState | None, paused: bool) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        if state is not None:
            st.badge(state.words, color=state.colour)
        if paused:
            st.badge(
                f"paused at step {st.session_state.get('paused_at', int(history.steps[-1])):,}".replace(
                    ",", " "
                )
            )
        words = [f"{len(history.steps)} measured steps"]
        status = history.status
        if status is not None:
            words.append(f"written by process {status.pid} on {status.host}")
        if history.resumed_at:
            words.append(f"resumed at step {', '.join(map(str, history.resumed_at[-3:]))}")
        if history.evaluations_left_out:
            words.append(f"{history.evaluations_left_out} evaluations between the steps, which count to none")
        st.caption(escaped(", ".join(words)), width="content")


def _choose(history: TrainingHistory) -> Shown:
    known = history.measures
    with st.container(horizontal=True, vertical_alignment="bottom"):
        with st.popover("Measures", type="tertiary"):
            measures = choose_names(
                "Measures",
                list(known),
                default_measures(history),
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
        choice = {dim: _choose_label(dim, labels, preferred[dim]) for dim, labels in dims.items()}
    steps = history.steps
    step, other = (_step_of(name) for name in ("step", "versus"))
    zoom = _zoom(float(steps[0]), float(steps[-1]))
    nearest = [None if each is None else int(steps[position_of(history, each)]) for each in (step, other)]
    return Shown(tuple(measures), choice, zoom, nearest[0], None if nearest[0] == nearest[1] else nearest[1])


def _choose_label(dim: str, labels: list[str], preferred: str) -> str:
    key = f"training_{dim}"
    if st.session_state.get(key) not in labels:
        st.session_state.pop(key, None)
    return st.selectbox(
        CONTROLS[dim].label if dim in CONTROLS else spoken(dim).capitalize(),
        labels,
        labels.index(preferred),
        key=key,
        bind="query-params",
        width=130,
    )


def _step_of(name: str) -> int | None:
    """A step of the URL; none where it is no number."""
    text = st.query_params.get(name, "")
    if not re.fullmatch(r"[0-9]{1,15}", text, re.ASCII):
        st.query_params.pop(name, None)
        return None
    return int(text)


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
    for name, key in (("step", "depth"), ("versus", "other")):
        step = pinned.get(key)
        if isinstance(step, (int, float)) and 0 <= step < LARGEST_STEP:
            st.query_params[name] = str(round(step))
        elif pinned:
            st.query_params.pop(name, None)


def _list_findings(reading: Reading, begun: Sequence[Begun]) -> None:
    """Where each finding began: a click pins the step, or opens the microscope."""
    if not begun:
        return
    told = "one finding" if len(begun) == 1 else f"{len(begun)} findings"
    with st.expander(f"{told}, from step {begun[0].step} on"):
        for number, each in enumerate(begun):
            finding = each.finding
            sign = BADGES[finding.severity.name][2]
            since = f"from step {each.step}"
            if each.before is not None:
                since = f"between step {each.before} and {each.step}"
            st.markdown(
                f"{sign} **{escaped(spoken(finding.verdict))}** {since}{'' if each.lasts else ', not at the last step'}"
            )
            with st.container(horizontal=True, gap="small"):
                st.button(
                    "Pin the step", key=f"begun_{number}", on_click=_pin, args=(each.step,), type="tertiary"
                )
                depth = worst_depth(finding, reading.analysis)
                st.button(
                    "Open the microscope",
                    key=f"microscope_{number}",
                    on_click=_open,
                    args=(reading, depth),
                    type="tertiary",
                    help="At the last state of the run.",
                )


def _pin(step: int) -> None:
    st.query_params["step"] = str(step)
    st.query_params.pop("versus", None)


def _open(reading: Reading, depth: int | None) -> None:
    open_microscope(
        st.session_state.get("runs", ()),
        look_at=reading.name,
        depth=depth,
    )


PAGE = Page(
    title="Training",
    url_path="training",
    help="At which step of the training, and at which depth, does what change?",
    show=_show,
)
