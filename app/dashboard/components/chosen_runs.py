"""How are runs chosen? In the sidebar and in the URL; a run that cannot be read explains why."""

from __future__ import annotations

import streamlit as st

from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.state import run_library
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.dashboard.state.run_library import UnreadableRun

MOST_RUNS = 30
"""Runs on a page: with more, curves cannot be told apart, and a first look takes minutes. A heuristic of ours."""

_KEY = "chosen_runs"
"""Key of the session state: Streamlit calls a page without arguments."""


def choose_runs() -> None:
    """Choose runs in the sidebar and in the URL as `?runs=`, read them, and remember them for the page."""
    listed = run_library.list_runs()
    names = list(listed)
    chosen: list[str] = []
    if names:
        with st.sidebar:
            chosen = st.multiselect(
                "Runs",
                names,
                # More curves in one figure are hard to tell from each other, and each run takes time to analyse.
                default=names[:3],
                key="runs",
                bind="query-params",
                placeholder="Choose runs",
                # Also for a URL, which may name all runs of a folder: what is beyond it is not analysed.
                max_selections=MOST_RUNS,
            )
            if len(names) > MOST_RUNS:
                st.caption(f"At most {MOST_RUNS} of the {len(names)} runs at once.")
    readings, unreadable = {}, []
    for name in chosen[:MOST_RUNS]:
        with st.spinner(f"Analysing {escaped(name)} …"):
            found = run_library.read_run(name, listed)
        if isinstance(found, UnreadableRun):
            unreadable.append(found)
        else:
            # A run of several chains has one reading for each.
            readings.update({reading.name: reading for reading in found})
    st.session_state[_KEY] = ChosenRuns(readings, tuple(unreadable))


def forget_runs() -> None:
    """Leave no reading in the session: a page that is open but idle would keep it in memory."""
    st.session_state.pop(_KEY, None)


def require_chosen_runs() -> ChosenRuns:
    """The chosen runs, after an explanation of those that cannot be read; ends the page where none is left.

    Returns
    -------
    ChosenRuns
        With at least one reading.
    """
    chosen: ChosenRuns = st.session_state[_KEY]
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
        st.info("No run is chosen. Choose one or more in the sidebar.", icon="👈")
