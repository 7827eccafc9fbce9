"""What is a page? Its declaration, its heading with the facts of the chosen runs, and why it cannot be shown."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import streamlit as st

from depthscope.app.dashboard.components.finding_card import escaped
from depthscope.app.dashboard.state import run_library
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.dashboard.state.run_reading import UnreadableRun
from depthscope.app.readings.readings import Reading
from depthscope.app.text.visible import LONGEST_NAME, LONGEST_TEXT, visible


@dataclass(frozen=True)
class Page:
    """One page of the dashboard, declared in a file of its own in `depthscope.app.dashboard.pages`.

    ``title``: Its name in the navigation.
    ``url_path``: Its address below the root, one word; empty for the page at the root. Visitors bookmark it.
    ``help``: The sentence below the heading: the question that the page answers.
    ``show``: Draws the page from the chosen runs.
    ``show_all``: Draws a page that is about all runs, whether some are chosen or not.
    ``of_training``: Whether, where no run is chosen, one of several steps is shown.
    """

    title: str
    url_path: str
    help: str
    show: Callable[[ChosenRuns], None] | None = None
    show_all: Callable[[], None] | None = None
    of_training: bool = False


def show_page(page: Page) -> None:
    """Draw a page for the chosen runs."""
    st.markdown(f"# {page.title}" if page.url_path else f"# {page.help}")
    if page.url_path:
        st.caption(page.help)
    say_unknown_runs()
    if page.show_all is not None:
        page.show_all()
    if page.show is None:
        return
    chosen = require_chosen_runs(of_training=page.of_training)
    try:
        page.show(chosen)
    except Exception as error:
        # A run that was written by another tool may contain what no figure expects. The log has the traceback; the
        # visitor needs to know that the page is incomplete, and which runs to leave out.
        logging.getLogger(__name__).warning("page %s failed", page.title, exc_info=True)
        reason = visible(f"{type(error).__name__}: {error}", longest=LONGEST_TEXT)
        names = ", ".join(map(escaped, chosen.readings))
        st.error(
            f"The rest of this page cannot be drawn for {names}: {escaped(reason)}. "
            "Leave one run out after another to find the one that it is about, and measure that one again."
        )


def show_facts(readings: Iterable[Reading]) -> None:
    """What is known about each run besides its numbers: its attributes as they are saved."""
    for reading in readings:
        with st.expander(f"About {escaped(reading.name)}"):
            st.json({**reading.attrs, "states": reading.analysis.sizes.get("depth")})


CHOSEN_AT_FIRST = 3
"""All runs of a folder with so few are shown. A heuristic of ours."""

MOST_RUNS = 30
"""Runs on a page: with more, curves cannot be distinguished, and a first look takes minutes. A heuristic of ours."""

MOST_NAMED = 5
"""Runs that are not here and are named."""

LOOKED_AT = "looked_at"
"""Key of the session state: the run whose row the visitor looked at last."""

_UNKNOWN = "unknown_runs"
_KEY = "chosen_runs"
"""Key of the session state: Streamlit calls a page without arguments."""


def choose_runs() -> None:
    """Choose runs in the sidebar and in the URL as `?runs=`, and remember their names for the page."""
    listed = run_library.list_runs()
    names = list(listed)
    chosen: list[str] = []
    # The runs that an address names when it is opened; later the address follows the choice.
    named = st.query_params.get_all("runs") if "runs" not in st.session_state else []
    asked = list(dict.fromkeys(named)) or None
    if names:
        with st.sidebar:
            chosen = st.multiselect(
                "Runs",
                names,
                # Of more than these the visitor chooses, from the map of all: each run takes time to analyse, and the first
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
    st.sidebar.caption("Shortcuts: g next chart, ←/→ next point")
    # A run that is deleted while the page is open leaves the field without a word.
    wanted = st.session_state.get(_KEY, []) if asked is None else asked
    unknown = [name for name in wanted if name not in listed]
    st.session_state[_KEY] = chosen[:MOST_RUNS]
    if asked is not None or unknown:
        st.session_state[_UNKNOWN] = (chosen, unknown)


def say_unknown_runs() -> None:
    """Runs that the address names, or that were chosen, and are not here, until others are chosen."""
    chosen, unknown = st.session_state.get(_UNKNOWN, ([], []))
    if not unknown or chosen != st.session_state[_KEY]:
        st.session_state.pop(_UNKNOWN, None)
        return
    shown = ", ".join(f"“{escaped(visible(name, longest=LONGEST_NAME))}”" for name in unknown[:MOST_NAMED])
    more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
    st.warning(
        f"Not here: {shown}{more}, chosen before or named by the address. They were deleted or renamed, or are in another "
        "folder than the dashboard was started with.",
        icon="⚠️",
    )


def require_chosen_runs(*, of_training: bool = False) -> ChosenRuns:
    """The chosen runs, after an explanation of those that cannot be read; ends the page where none is left.

    ``of_training``: where none is chosen, whether one of a training is to be looked at.
    """
    # Not left in the session, where a page that is open but idle would keep them in memory.
    names = st.session_state[_KEY] or _looked_at(of_training=of_training)
    listed = run_library.list_runs()
    found = [run_library.read_run(name, listed) for name in names]
    unreadable = [run for run in found if isinstance(run, UnreadableRun)]
    # A run of several chains has one reading for each.
    readings = [reading for run in found if not isinstance(run, UnreadableRun) for reading in run]
    waiting = [run.name for run in unreadable if run.waits]
    if waiting:
        st.fragment(_wait, run_every=1.0)(waiting)
    for run in unreadable:
        if run.waits:
            continue
        with st.container(border=True):
            st.markdown(f"## ⚠ {escaped(run.name)} cannot be shown")
            st.markdown(escaped(run.reason))
            st.caption("Measure the model again, then reload this page:")
            # Another name: of a run that a newer version wrote, this one must not destroy what it cannot read.
            st.code("depthscope probe CHECKPOINT --text FILE --out NEW.zarr", "bash", wrap_lines=True)
    if not readings:
        if not unreadable:
            explain_none()
        st.stop()  # ends this run of the script: the rest of the page is not drawn
    return ChosenRuns({reading.name: reading for reading in readings})


def _wait(names: Sequence[str]) -> None:
    """Say which runs are not there yet, and draw the whole page when one of them is."""
    listed = run_library.list_runs()
    found = [run_library.read_run(name, listed) for name in names]
    waiting = [each for each in found if isinstance(each, UnreadableRun) and each.waits]
    if len(waiting) < len(names):
        st.rerun()
    words = " ".join(f"**{escaped(each.name)}**: {each.reason}" for each in waiting)
    st.info(f"{words} The page looks each second.", icon="ℹ️")


def _looked_at(*, of_training: bool) -> list[str]:
    """Where no run is chosen: the one whose row was looked at last on the map, else the worst that is known, as on the map."""
    listed = run_library.list_runs()
    name = st.session_state.get(LOOKED_AT)
    if name not in listed or of_training:
        found = {name: run_library.summaries_of(name, path) for name, path in listed.items()}
        known = {name: of for name, of in found.items() if isinstance(of, list) and of}
        trained = {name: of for name, of in known.items() if any(each.num_steps > 1 for each in of)}
        known = (trained or known) if of_training else known
        worst = {name: min(each.badness for each in of) for name, of in known.items()}
        name = name if name in worst else min(worst, key=worst.__getitem__, default=next(iter(listed), None))
    if name is None:
        return []
    st.caption(f"No run is chosen: this is {escaped(name)}. Others are on the page Home and at the side.")
    return [name]


def explain_none() -> None:
    """There is no run."""
    st.info("There is no run here yet. Measure a model, then start the dashboard on the result.", icon="ℹ️")
    st.code(
        "depthscope demo\ndepthscope probe CHECKPOINT --text FILE --out runs/a.zarr\ndepthscope dashboard runs",
        "bash",
        wrap_lines=True,
    )
