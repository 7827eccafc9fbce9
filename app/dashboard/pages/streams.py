"""What do connections do to the streams? Matrices, the product of any two, what survives, gains and spectra: one column."""

from __future__ import annotations

import numpy as np
import streamlit as st

from depthscope.app.dashboard.components.chart import build, card, cards_in_rows, show_legend
from depthscope.app.dashboard.components.controls import choose, choose_index, choose_one
from depthscope.app.dashboard.components.depth_pane import show_matrices
from depthscope.app.dashboard.components.finding_card import escaped
from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.state import run_library
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.figures import Heatmap
from depthscope.app.figures.build.answers import streams_answer
from depthscope.app.figures.build.matrix_figure import picture_figure
from depthscope.app.figures.palette import colour_numbers
from depthscope.app.readings.close_up import CloseUp
from depthscope.app.readings.readings import Reading

SHOWN = ("deflated_gain", "composite_gain", "mixing_singular_value", "signal_share")
"""Figures that are shown: survival, gain, spectrum, and who reads what."""

PICTURE_HEIGHT = 210
"""Pixels of a row of pictures."""


def _show(chosen: ChosenRuns) -> None:
    figures = chosen.figures("mixing")
    if not figures:
        st.info(
            "None of the chosen runs has streams to mix: plain residual networks add each branch to one stream. Choose a run "
            "of a hyper-connection (HC or mHC) model, such as those of `depthscope demo`.",
            icon="ℹ️",
        )
        return
    for name, reading in chosen.readings.items():
        answer = streams_answer(reading.analysis)
        if answer:
            st.markdown(f"**{escaped(name)}**: {escaped(answer)}")
    close_ups = {name: run_library.close_up_of(reading) for name, reading in chosen.readings.items()}
    mixing = {name: each for name, each in close_ups.items() if each is not None and each.num_connections}
    if mixing:
        with st.container(horizontal=True, vertical_alignment="bottom"):
            run = choose_one("Run", list(mixing), "mixing_run")
            last = mixing[run].num_connections - 1
            a = choose_index("From connection a", last, "from_connection", default=0, width=160)
            b = choose_index("to connection b", last, "to_connection", default=last, width=160)
            st.caption(
                "The product H_res(b) ⋯ H_res(a) of every token; for a = b one matrix.", width="content"
            )
        _show_matrices(chosen.readings[run], mixing[run], a, b)
    else:
        st.info(
            "None of the chosen runs has the matrices of single tokens: their connections were recorded as sums alone, or "
            "their files have changed. The figures below show what the sums give.",
            icon="ℹ️",
        )
    names = [name for name in SHOWN if name in figures]
    selection = choose([figures[name] for name in names], chosen.analyses)
    show_legend(colour_numbers(chosen.analyses))
    cards_in_rows({f"chart_{name}": build(figures[name], chosen.analyses, selection) for name in names})


def _show_matrices(reading: Reading, close_up: CloseUp, a: int, b: int) -> None:
    """The matrices of every connection, and the product of some."""
    pictures = depth_pictures(close_up.mean_matrices, close_up, reading.name)
    card(pictures, key="mixing_pictures", height=PICTURE_HEIGHT)
    first, last = min(a, b), max(a, b)
    matrices = close_up.matrices(first) if first == last else close_up.composite(first, last)
    if not matrices:
        st.info("The run has no real token: all of it is padding.", icon="ℹ️")
        return
    with st.container(border=True):
        st.markdown(f"**{escaped(_words_of(close_up, first, last))}**")
        show_matrices(matrices, "bench")


def _words_of(close_up: CloseUp, first: int, last: int) -> str:
    if first == last:
        return f"H_res of {close_up.connection_name(first)}"
    return (
        f"Product of {last - first + 1} H_res, from {close_up.connection_name(first)} "
        f"to {close_up.connection_name(last)}"
    )


def depth_pictures(means: np.ndarray, close_up: CloseUp, run: str) -> Heatmap:
    """H_res of every connection, the mean over tokens."""
    return picture_figure(
        list(means),
        [close_up.connection_name(i) for i in range(len(means))],
        range(len(means)),
        len(means),
        name="h_res_pictures",
        title="H_res of every connection",
        run=run,
        x_label="connection (0 = first sublayer)",
        of="mean over tokens",
    )


PAGE = Page(
    title="Streams",
    url_path="streams",
    help="Do the connections keep the signal, amplify it, or average the streams into one?",
    show=_show,
)
