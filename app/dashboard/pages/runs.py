"""What is wrong, and with which run? The verdicts of all runs, then the findings and facts of the chosen ones."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from depthscope.app.dashboard.components.chart import build, card
from depthscope.app.dashboard.components.finding_card import show_card, show_causes, tally
from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.components.run_facts import facts_table
from depthscope.app.dashboard.components.verdict_board import show_verdict_board
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.figures import FIGURES
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.findings import cards_of, findings_table
from depthscope.app.tables.formats import to_csv
from depthscope.app.text.cards import Card

FIRST_FIGURES = ("effective_rank", "composite_gain", "cka", "gradient_norm", "residual_norm")
"""The two first of these that the runs feed are shown: collapse and mixing where there is mixing."""

COLUMNS = 3
"""A finding is a paragraph: more columns than this leave too few words in a line."""


def _show(chosen: ChosenRuns) -> None:
    readings = list(chosen.readings.values())
    if len(readings) == 1:
        _show_one_run(readings[0])
    else:
        _show_several_runs(readings)
    # More than two are cut off by `zip` below: the row has two columns.
    names = [name for name in FIRST_FIGURES if chosen.feeding(FIGURES[name].needs)]
    for column, name in zip(st.columns(2), names, strict=False):
        with column:
            # No controls here: every figure in the version that its own page opens with.
            figure = build(FIGURES[name], chosen.analyses, {})
            card(figure, key=f"overview_{name}", runs=list(chosen.analyses))
    with st.container(border=True):
        left, right = st.columns([5, 1], vertical_alignment="center")
        left.markdown("##### Runs")
        with right, st.container(horizontal=True, horizontal_alignment="right"):
            st.download_button(
                "Findings as CSV",
                lambda: to_csv(findings_table(readings)).encode(),  # only when it is asked for
                file_name="findings.csv",
                mime="text/csv",
                key="findings_csv",
                on_click="ignore",  # the download changes nothing on the page
                type="tertiary",
            )
        st.table(facts_table(readings), border="horizontal")


def _show_one_run(reading: Reading) -> None:
    """The worst findings in columns, the others folded."""
    _show_name(reading)
    cards = cards_of(reading)
    worst = cards[:COLUMNS]
    if not worst:
        _show_nothing_found()
        return
    for column, finding in zip(st.columns(len(worst)), worst, strict=True):
        with column:
            show_card(finding, of=reading)
    show_causes(reading.findings)
    _show_folded(cards[COLUMNS:], reading)


def _show_several_runs(readings: Sequence[Reading]) -> None:
    """The worst finding of each run, in columns where they fit."""
    columns = st.columns(len(readings)) if len(readings) <= COLUMNS else [st.container() for _ in readings]
    for column, reading in zip(columns, readings, strict=True):
        with column:
            _show_name(reading)
            cards = cards_of(reading)
            if cards:
                show_card(cards[0], of=reading)
                _show_folded(cards[1:], reading)
            else:
                _show_nothing_found()


def _show_name(reading: Reading) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.markdown(f"**{escaped(reading.name)}**", width="content")
        tally(reading.findings)


def _show_nothing_found() -> None:
    with st.container(border=True):
        st.markdown("The signal passes: no metric crossed its threshold.")
        st.caption("The next pages show how far each one is from there.")


def _show_folded(cards: Sequence[Card], reading: Reading) -> None:
    if cards:
        with st.expander(f"{len(cards)} more"):
            for finding in cards:
                show_card(finding, of=reading)


PAGE = Page(
    title="Runs",
    url_path="",
    help="What happens to the signal on its way through depth, and where does it die, explode or collapse?",
    show=_show,
    first=show_verdict_board,
)
