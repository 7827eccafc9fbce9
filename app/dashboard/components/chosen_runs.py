"""How are runs chosen? In the sidebar and in the URL; a run that cannot be read explains why."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.state import run_library
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.dashboard.state.run_library import UnreadableRun
from depthscope.app.readings.readings import Reading

CHOSEN_AT_FIRST = 3
"""A folder of so many runs is shown whole. A heuristic of ours."""

MOST_RUNS = 30
"""Runs on a page: with more, curves cannot be told apart, and a first look takes minutes. A heuristic of ours."""

_KEY = "chosen_runs"
"""Key of the session state: Streamlit calls a page without arguments."""


def choose_runs() -> None:
    """Choose runs in the sidebar and in the URL as `?runs=`, and remember their names for the page."""
    listed = run_library.list_runs()
    names = list(listed)
    chosen: list[str] = []
    if names:
        with st.sidebar:
            chosen = st.multiselect(
                "Runs",
                names,
                # Of more than these the visitor chooses, from the table of all: each run takes time to analyse, and the first
                # by the alphabet are no better than others.
                default=names if len(names) <= CHOSEN_AT_FIRST else [],
                key="runs",
                bind="query-params",
                placeholder="Choose runs",
                # Also for a URL, which may name all runs of a folder: what is beyond it is not analysed.
                max_selections=MOST_RUNS,
            )
            if len(names) > MOST_RUNS:
                st.caption(f"At most {MOST_RUNS} of the {len(names)} runs at once.")
    st.session_state[_KEY] = chosen[:MOST_RUNS]


def _read(names: Sequence[str]) -> ChosenRuns:
    readings: dict[str, Reading] = {}
    unreadable: list[UnreadableRun] = []
    listed = run_library.list_runs()
    for name in names:
        with st.spinner(f"Analysing {escaped(name)} …"):
            found = run_library.read_run(name, listed)
        if isinstance(found, UnreadableRun):
            unreadable.append(found)
        else:
            # A run of several chains has one reading for each.
            readings.update({reading.name: reading for reading in found})
    return ChosenRuns(readings, tuple(unreadable))


def require_chosen_runs() -> ChosenRuns:
    """The chosen runs, after an explanation of those that cannot be read; ends the page where none is left.

    Returns
    -------
    ChosenRuns
        With at least one reading.
    """
    # Read here and not where they are chosen: the table of all runs is drawn before the first of them is analysed. They are
    # not left in the session, where a page that is open but idle would keep them in memory.
    chosen = _read(st.session_state[_KEY])
    for run in chosen.unreadable:
        with st.container(border=True):
            st.markdown(f"##### ⚠ {escaped(run.name)} cannot be shown")
            st.markdown(escaped(run.reason))
            st.caption("Measure the model again, then reload this page:")
            # Another name: of a run that a newer version wrote, this one must not destroy what it cannot read.
            st.code("depthscope probe CHECKPOINT --text FILE --out NEW.nc", "bash")
    if not chosen.readings:
        if not chosen.unreadable:
            _explain_none()
        st.stop()  # ends this run of the script: the rest of the page is not drawn
    return chosen


def _explain_none() -> None:
    """Why no run is shown: there is none, or none is chosen."""
    if not run_library.list_runs():
        st.info(
            "There is no run here yet. Measure a model, then start the dashboard on the result.", icon="🔭"
        )
        st.code(
            "depthscope demo\ndepthscope probe CHECKPOINT --text FILE --out runs/a.nc\ndepthscope dashboard runs",
            "bash",
        )
    else:
        st.info("No run is chosen. Click a row of the table of runs, or choose in the sidebar.", icon="👈")
