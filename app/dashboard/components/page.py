"""What is a page? Its declaration, its heading with the facts of the chosen runs, and why it cannot be shown."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from depthscope.app.dashboard.components.finding_card import escaped
from depthscope.app.dashboard.state import growing_runs, run_library
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.dashboard.state.run_reading import UnreadableRun
from depthscope.app.readings.readings import Reading
from depthscope.app.text.visible import LONGEST_NAME, LONGEST_TEXT, shortened, visible


@dataclass(frozen=True)
class Page:
    """One page of the dashboard, declared in a file of its own in `depthscope.app.dashboard.pages`.

    ``title``: Its name in the navigation.
    ``url_path``: Its address below the root, one word; empty for the page at the root. Visitors bookmark it.
    ``help``: The sentence below the heading: the question that the page answers.
    ``show``: Draws the page from the chosen runs.
    ``show_all``: Draws a page that is about all runs, whether some are chosen or not.
    """

    title: str
    url_path: str
    help: str
    show: Callable[[ChosenRuns], None] | None = None
    show_all: Callable[[], None] | None = None


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
    chosen = require_chosen_runs()
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


def facts_table(readings: Iterable[Reading]) -> pd.DataFrame:
    """Facts as rows, runs as columns: what the attributes of the runs say in a word, a number or a sentence.

    Returns: Of escaped text, with a dash where a run lacks a fact.
    """
    table = pd.DataFrame({escaped(reading.name): _facts(reading) for reading in readings})
    return table.fillna("–").map(escaped).rename_axis("fact")


DIGEST = 24
"""Letters of a digest, by which data sets are told apart at a glance; the run has all of them."""

# Attribute of a run → what the fact is called; others are in the run itself.
_NAMES = {
    "model": "model",
    "family": "family",
    "n_streams": "streams",
    "constraint": "mixing matrices",
    "proof": "reading",
    "orientation": "orientation",
    "not_covered": "not covered",
    "memory": "memory",
    "dtype": "precision",
    "loss_reduction": "loss reduction",
    "seed": "seed",
    "data": "data",
    "data_digest": "digest of the data",
    "created": "created",
    "software": "software",
}


def _facts(reading: Reading) -> dict[str, Any]:
    analysis, attrs = reading.analysis, reading.attrs
    counts = analysis["num_tokens"].sel(scope="data", tokens="all") if "num_tokens" in analysis else None
    facts = {
        **{name: _in_words(attrs.get(attribute)) for attribute, name in _NAMES.items()},
        "states": analysis.sizes.get("depth"),
        # The largest over depth: stages of a convolutional network have fewer tokens further down.
        "tokens analysed": None if counts is None else f"{float(counts.max()):g}",
    }
    known = {name: str(value) for name, value in facts.items() if value not in (None, "", [])}
    return {
        # A digest is one word, which a table does not break.
        name: shortened(text, DIGEST if name == _NAMES["data_digest"] else 3 * LONGEST_NAME, counted=False)
        for name, text in known.items()
    }


def _in_words(value: Any) -> Any:
    """Of one or several facts with a sentence the sentences, of versions a list; what else there is as it is."""
    parts = value if isinstance(value, list) else [value]
    if parts and all(isinstance(part, Mapping) and "sentence" in part for part in parts):
        return "; ".join(str(part["sentence"]) for part in parts)
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value


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
    asked = _asked_for()
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


def _asked_for() -> list[str] | None:
    """The runs that an address names when it is opened; None later, when the address follows the choice."""
    if "runs" in st.session_state or "runs" not in st.query_params:
        return None
    return list(dict.fromkeys(st.query_params.get_all("runs")))


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


def _read(names: Sequence[str]) -> ChosenRuns:
    readings: dict[str, Reading] = {}
    unreadable: list[UnreadableRun] = []
    listed = run_library.list_runs()
    bar = st.empty()  # where nothing is analysed, nothing is drawn in it
    for number, name in enumerate(names):

        def progress(metric: str, done: int, total: int, number: int = number, name: str = name) -> None:
            of = f" ({number + 1} of {len(names)})" if len(names) > 1 else ""
            bar.progress(done / max(total, 1), f"Analysing {escaped(name)}{of}: {escaped(metric)}")

        found = run_library.read_run(name, listed, progress=progress)
        if isinstance(found, UnreadableRun):
            unreadable.append(found)
        else:
            # A run of several chains has one reading for each.
            readings.update({reading.name: reading for reading in found})
    bar.empty()
    return ChosenRuns(readings, tuple(unreadable))


def require_chosen_runs() -> ChosenRuns:
    """The chosen runs, after an explanation of those that cannot be read; ends the page where none is left."""
    # Not left in the session, where a page that is open but idle would keep them in memory.
    names = st.session_state[_KEY] or _looked_at()
    chosen = _read(names)
    waiting = {run.name: run.path for run in chosen.unreadable if run.waits}
    if waiting:
        st.fragment(_wait, run_every=1.0)(waiting)
    for run in chosen.unreadable:
        if run.waits:
            continue
        with st.container(border=True):
            st.markdown(f"## ⚠ {escaped(run.name)} cannot be shown")
            st.markdown(escaped(run.reason))
            st.caption("Measure the model again, then reload this page:")
            # Another name: of a run that a newer version wrote, this one must not destroy what it cannot read.
            st.code("depthscope probe CHECKPOINT --text FILE --out NEW.zarr", "bash")
    if not chosen.readings:
        if not chosen.unreadable:
            explain_none()
        st.stop()  # ends this run of the script: the rest of the page is not drawn
    return chosen


def _wait(waiting: Mapping[str, Path]) -> None:
    """Say which trainings have no step yet, and draw the whole page when one of them has."""
    if not all(map(growing_runs.is_waiting, waiting.values())):
        st.rerun()
    names = ", ".join(f"**{escaped(name)}**" for name in waiting)
    st.info(
        f"{names}: {run_library.BEFORE_THE_FIRST_STEP} The page looks each second and shows the first one.",
        icon="ℹ️",
    )


def _looked_at() -> list[str]:
    """Where no run is chosen: the one whose row was looked at last on the map, else the worst that is known, as on the map."""
    listed = run_library.list_runs()
    name = st.session_state.get(LOOKED_AT)
    if name not in listed:
        found = {name: run_library.summaries_of(name, path) for name, path in listed.items()}
        known = {
            name: min(each.badness for each in of)
            for name, of in found.items()
            if isinstance(of, list) and of
        }
        name = min(known, key=known.__getitem__, default=next(iter(listed), None))
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
    )
