"""What do connections do to the streams? Matrices, the product of any two, what survives, gains and spectra: one column."""

from __future__ import annotations

import streamlit as st

from depthscope.app.dashboard.components.chart import build, card, show_legend
from depthscope.app.dashboard.components.controls import choose, choose_one
from depthscope.app.dashboard.components.depth_pane import show_matrices
from depthscope.app.dashboard.components.finding_card import escaped
from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.state import run_library
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.figures import Heatmap, available
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
    kinds = available(chosen.analyses).items()
    figures = {name: kind for name, kind in kinds if kind.question == "mixing"}
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
            numbers = list(map(str, range(mixing[run].num_connections)))
            a = int(choose_one("From connection a", numbers, "from_connection", width=160))
            b = int(choose_one("to connection b", numbers, "to_connection", default=numbers[-1], width=160))
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
    for first in range(0, len(names), 2):
        # A row of columns for each pair: in two long columns a tall card would move all that follow out of line.
        for column, name in zip(st.columns(2), names[first : first + 2], strict=False):
            with column:
                figure = build(figures[name], chosen.analyses, selection)
                card(figure, key=f"chart_{name}", height=430 if isinstance(figure, Heatmap) else 300)


def _show_matrices(reading: Reading, close_up: CloseUp, a: int, b: int) -> None:
    """The matrices of every connection, and the product of some."""
    first, last = min(a, b), max(a, b)
    matrices = close_up.matrices(first, last)
    if not matrices:
        st.info("The run has no real token: all of it is padding.", icon="ℹ️")
        return
    pictures = [each.h_res for each in close_up.pictures("mean")[0]]
    names = [close_up.connection_name(i) for i in range(len(pictures))]
    figure = picture_figure(
        pictures,
        names,
        range(len(pictures)),
        len(pictures),
        name="h_res_pictures",
        title="H_res of every connection",
        run=reading.name,
        x_label="connection (0 = first sublayer)",
        of="mean over tokens",
    )
    card(figure, key="mixing_pictures", height=PICTURE_HEIGHT)
    words = f"Product of {last - first + 1} H_res, from {names[first]} to {names[last]}"
    with st.container(border=True):
        st.markdown(f"**{escaped(words if last > first else f'H_res of {names[first]}')}**")
        show_matrices(matrices)


PAGE = Page(
    title="Streams",
    url_path="streams",
    help="Do the connections keep the signal, amplify it, or average the streams into one?",
    show=_show,
)
