"""What is wrong, and with which run? The verdicts of all runs, then the findings and facts of the chosen ones."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import streamlit as st
import xarray as xr

from depthscope.app.dashboard.components.chart import build, card
from depthscope.app.dashboard.components.finding_card import show_card, show_causes, tally
from depthscope.app.dashboard.components.legend import show_legend
from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.components.run_facts import facts_table
from depthscope.app.dashboard.components.verdict_board import show_verdict_board
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.figures import FIGURES, Lines
from depthscope.app.figures.build.folded_runs import folded, folded_colours
from depthscope.app.figures.palette import RUN_COLOUR, RUN_COLOURS, colour_numbers
from depthscope.app.readings.kept_readings import summary_of
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.findings import cards_of, findings_table
from depthscope.app.tables.formats import to_csv
from depthscope.app.tables.verdict_table import experiments_of, groupable, plain_attributes
from depthscope.app.text.cards import ABOUT_THE_READING, Card
from depthscope.app.text.visible import visible

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
    analyses, experiments = _choose_colours(readings, chosen.analyses)
    show_legend(folded_colours(colour_numbers(analyses), experiments))
    for column, name in zip(st.columns(2), names, strict=False):
        with column:
            # No other controls here: every figure in the version that its own page opens with.
            figure = build(FIGURES[name], analyses, {})
            if isinstance(figure, Lines) and experiments:
                figure = folded(figure, experiments)
            card(figure, key=f"overview_{name}")
    with st.container(border=True):
        left, right = st.columns([5, 1], vertical_alignment="center")
        left.markdown("## About the runs")
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


def _choose_colours(
    readings: Sequence[Reading], analyses: Mapping[str, xr.Dataset]
) -> tuple[Mapping[str, xr.Dataset], dict[str, str]]:
    """Analyses in the colours of an attribute, and the experiments whose seeds are put together."""
    summaries = [summary_of(reading) for reading in readings]
    names = groupable(summaries)
    experiments = experiments_of(summaries)
    if not names and not experiments:
        return analyses, {}
    with st.container(horizontal=True, vertical_alignment="bottom"):
        # The attribute of other runs: Streamlit raises for a value that is no option.
        if st.session_state.get("colour") not in (None, *names):
            st.session_state.pop("colour")
        by = names and st.selectbox(
            "Colour by", names, index=None, key="colour", bind="query-params", placeholder="run", width=220
        )
        in_bands = bool(experiments) and st.toggle("Seeds as a band", key="band", bind="query-params")
        if by:
            values = {summary.name: plain_attributes(summary.attrs).get(by, "–") for summary in summaries}
            order = sorted(set(values.values()), key=lambda value: (isinstance(value, str), value))
            analyses = {
                name: data.assign_attrs({RUN_COLOUR: order.index(values[name]) % len(RUN_COLOURS)})
                for name, data in analyses.items()
            }
            _show_key(by, order)
    return analyses, experiments if in_bands else {}


def _show_key(by: str, order: Sequence[str | int | float | bool]) -> None:
    """Which colour is which value."""
    parts = [
        f'<span style="color: {RUN_COLOURS[number % len(RUN_COLOURS)]}">■</span> {html.escape(visible(value))}'
        for number, value in enumerate(order)
    ]
    more = " (colours repeat)" if len(order) > len(RUN_COLOURS) else ""
    st.html(f"{html.escape(visible(by))}: {' &nbsp; '.join(parts)}{more}")


def _show_one_run(reading: Reading) -> None:
    """The worst findings in columns, the others folded."""
    _show_name(reading)
    cards = _about(reading, "network")
    worst = cards[:COLUMNS]
    if worst:
        for column, finding in zip(st.columns(len(worst)), worst, strict=True):
            with column:
                show_card(finding, of=reading)
    else:
        _show_nothing_found()
    show_causes(reading.findings)
    _show_folded(cards[COLUMNS:], reading)
    _show_about_the_reading(reading)


def _show_several_runs(readings: Sequence[Reading]) -> None:
    """The worst finding of each run, in columns where they fit."""
    columns = st.columns(len(readings)) if len(readings) <= COLUMNS else [st.container() for _ in readings]
    for column, reading in zip(columns, readings, strict=True):
        with column:
            _show_name(reading)
            cards = _about(reading, "network")
            if cards:
                show_card(cards[0], of=reading)
                _show_folded(cards[1:], reading)
            else:
                _show_nothing_found()
            _show_about_the_reading(reading)


def _about(reading: Reading, what: str) -> list[Card]:
    """The cards about the network, or those about how far the run can be trusted."""
    return [card for card in cards_of(reading) if card.finding.about == what]


def _show_about_the_reading(reading: Reading) -> None:
    """A line of its own: what could not be proved is no finding about the network."""
    cards = _about(reading, "reading")
    if cards:
        titles = " · ".join(escaped(card.title.rstrip(".")) for card in cards)
        with st.expander(f"{ABOUT_THE_READING}: {titles}"):
            for card in cards:
                show_card(card, of=reading)


def _show_name(reading: Reading) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.markdown(f"## {escaped(reading.name)}", width="content")
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
    help="Where in the network does the signal vanish, explode or collapse?",
    show=_show,
    first=show_verdict_board,
)
