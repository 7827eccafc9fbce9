"""Where exactly, in which token and which stream? One run from the embedding to the last state."""

from __future__ import annotations

import re
from pathlib import Path

import streamlit as st

from depthscope.app.dashboard.components.controls import choose_names, choose_one
from depthscope.app.dashboard.components.depth_pane import show_depth
from depthscope.app.dashboard.components.finding_card import escaped
from depthscope.app.dashboard.components.microscope import (
    View,
    depth_names,
    first_pin,
    show_panels,
    show_text,
    strips_of,
)
from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.state import growing_runs, run_library
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.dashboard.state.run_reading import UnreadableRun
from depthscope.app.figures import FIGURES
from depthscope.app.figures.build.answers import least_needed
from depthscope.app.readings.close_up import MARKED, TOKEN_MEASURES, WHOSE, CloseUp
from depthscope.app.readings.readings import Reading
from depthscope.diagnostics import schema

MOST_STRIPS = 12
"""Curves below each other. A heuristic of ours."""


def _show(chosen: ChosenRuns) -> None:
    reading = chosen.readings[choose_one("Run", list(chosen.readings), "look", width=320)]
    if not depth_names(reading):
        st.info(
            "This run has no states: it was made of weights alone, or of other numbers without a depth.",
            icon="ℹ️",
        )
        return
    follows = growing_runs.is_growing(Path(reading.path))
    # Only this part of the page runs again when a depth is pinned, and while the run grows.
    st.fragment(_look, run_every=1.0 if follows else None)(reading, follows)


def _look(reading: Reading, follows: bool = False) -> None:
    if follows:
        reading = _say_state(reading)
    close_up = run_library.close_up_of(reading)
    st.markdown(f"## {escaped(reading.name)}")
    least = least_needed(reading.analysis, reading.results)
    if least:
        st.caption(escaped(least))
    left, right = st.columns([4, 3], gap="medium")
    with left:
        view = _choose_view(reading, close_up)
        flat = show_panels(reading, close_up, view, on_pin=_pinned)
        if flat:
            st.caption(f"The same at every depth, and not drawn: {escaped('; '.join(flat))}.")
        st.caption(
            "Click or ←/→ pins a depth; a click in the map or ↑/↓ marks a token; dragging "
            "zooms in, a double click shows all. Shaded: where the findings are."
        )
        if close_up is not None and close_up.has_texts:
            show_text(close_up, depth_names(reading), view)
    with right, st.container(key="microscope_detail"):
        show_depth(reading, close_up, view, on_token=_marked)


def _say_state(reading: Reading) -> Reading:
    """The same reading as of the last steps of its run, and a line about them."""
    name, path = reading.name, Path(reading.path)
    state = growing_runs.live_states({name: path}).get(name)
    if state is not None:
        st.badge(state.words, color=state.colour)
    known = growing_runs.read_growing(reading.run, path)
    chains = {} if isinstance(known, UnreadableRun) else {each.chain: each for each in known}
    found = chains.get(reading.chain)
    if found is None or (state is not None and not state.is_growing):
        st.rerun()  # of the whole page: this stops the fragment's clock, and shows what has become of the run
    assert found is not None  # `rerun` does not return
    step = found.attrs.get(schema.LIVE, {}).get("last_step")
    st.caption(
        f"Numbers of step {step}, analysed again when there is time; curves of every step are on the page Training."
    )
    return found


def _choose_view(reading: Reading, close_up: CloseUp | None) -> View:
    names, shown = strips_of(reading)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        measure, sequence, stream, whose = next(iter(TOKEN_MEASURES)), 0, "mean", "mean"
        token = _token_of(close_up)
        if close_up is not None:
            measure = choose_one(
                "Tokens", list(TOKEN_MEASURES), "measure", words=TOKEN_MEASURES.__getitem__, width=230
            )
            sequences = [str(number) for number in range(close_up.num_sequences)]
            sequence = int(choose_one("Sequence", sequences, "sequence", width=110))
            if close_up.num_streams > 1:
                streams = ["mean", *map(str, range(close_up.num_streams))]
                stream = choose_one("Stream", streams, "of_stream", width=110)
            if close_up.num_connections:
                options = [each for each in WHOSE if each != MARKED or token is not None]
                whose = choose_one("H_res of", options, "whose", words=WHOSE.__getitem__, width=200)
            if close_up.num_sequences < close_up.sequences:
                st.caption(
                    f"The first {close_up.num_sequences} of {close_up.sequences} sequences: the others do not fit into memory."
                )
        with st.popover("Curves", type="tertiary"):
            strips = choose_names(
                "Curves",
                names,
                shown,
                key="strips",
                words={name: FIGURES[name].title for name in names},
                most=MOST_STRIPS,
            )
    pin = _pinned_depth(len(depth_names(reading)) - 1)
    return View(
        tuple(strips), measure, sequence, stream, first_pin(reading) if pin is None else pin, whose, token
    )


def _pinned_depth(last: int) -> int | None:
    """The depth of the URL; one of a deeper run, or none at all, is none."""
    text = st.query_params.get("pin", "")
    if st.session_state.get("pin") is not None:  # a click on the map leads here
        text = str(st.session_state.pop("pin"))
    if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) or int(text) > last:
        st.query_params.pop("pin", None)
        return None
    st.query_params["pin"] = text
    return int(text)


def _pinned() -> None:
    """Put what was pinned into the URL, before the page is drawn anew."""
    pinned = st.session_state["microscope"].get("pin") or {}
    depth = pinned.get("depth")
    if isinstance(depth, (int, float)) and depth >= 0:
        st.query_params["pin"] = str(int(depth))
    row = pinned.get("token")
    if isinstance(row, (int, float)) and row >= 0:
        _mark(int(st.session_state.get("sequence") or 0), int(row))


def _marked() -> None:
    """Put the token that was clicked in a table into the URL, and show its sequence."""
    token = (st.session_state.get("microscope_pane") or {}).get("token")
    if isinstance(token, list) and len(token) == 2 and all(isinstance(each, (int, float)) for each in token):
        _mark(*map(int, token))
    else:
        st.query_params.pop("token", None)


def _mark(sequence: int, position: int) -> None:
    st.query_params["token"] = f"{sequence}.{position}"
    st.session_state["sequence"] = str(sequence)


def _token_of(close_up: CloseUp | None) -> tuple[int, int] | None:
    """The marked token of the URL; one that the run does not have is none."""
    found = re.fullmatch(r"(\d{1,9})\.(\d{1,9})", st.query_params.get("token", ""), re.ASCII)
    if found is not None and close_up is not None:
        sequence, position = int(found[1]), int(found[2])
        rows, columns = close_up.mask.shape
        if sequence < rows and position < columns and close_up.mask[sequence, position]:
            return sequence, position
    st.query_params.pop("token", None)
    return None


PAGE = Page(
    title="Microscope",
    url_path="microscope",
    help="One run from the embedding to the last state: where exactly, in which token and which stream?",
    show=_show,
)
