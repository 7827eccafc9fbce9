"""How is one question shown? Its findings, its figures under the controls that change them, and what costs more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import streamlit as st

from depthscope.app.dashboard.components.chart import build, card
from depthscope.app.dashboard.components.controls import choose, choose_section, chosen_run
from depthscope.app.dashboard.components.finding_card import show_card
from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.dashboard.components.on_request import offer_metrics
from depthscope.app.dashboard.state.chosen_runs import ChosenRuns
from depthscope.app.figures import FIGURES, Figure, FigureKind, Heatmap
from depthscope.app.figures.build.answers import answer_to
from depthscope.app.tables.findings import cards_of
from depthscope.diagnostics import CATALOGUE

__all__ = [
    "cards_in_rows",
    "show_answers",
    "show_figures",
    "show_findings",
    "show_in_rows",
    "show_on_request",
]


def show_answers(chosen: ChosenRuns, question: str) -> None:
    """One sentence a run, before any figure; what is true of all of them is said once."""
    found = {
        name: answer_to(question, reading.analysis, reading.results)
        for name, reading in chosen.readings.items()
    }
    answers = {name: answer for name, answer in found.items() if answer}
    # Empty for a single sentence, which is the answer.
    last = {answer.rpartition(". ")[2] if ". " in answer else "" for answer in answers.values()}
    of_all = last.pop() if len(answers) > 1 and len(last) == 1 else ""
    for name, answer in answers.items():
        st.markdown(f"**{escaped(name)}**: {escaped(answer.removesuffix(of_all))}")
    if of_all:
        st.caption(escaped(of_all))


def show_findings(chosen: ChosenRuns, question: str) -> None:
    """Findings on the metrics that a question's figures draw, folded under the worst one of each run.

    ``question``: A question of the register of figures.
    """
    kinds = [kind for kind in FIGURES.values() if kind.question == question]
    # Also of figures that the runs do not feed: a finding is worth reading without its curve.
    metrics = {name for kind in kinds for name in (*kind.needs, *kind.also)}
    for name, reading in chosen.readings.items():
        cards = [each for each in cards_of(reading) if each.finding.metric in metrics]
        if cards:
            with st.expander(f"{escaped(name)}: {escaped(cards[0].why)}"):
                for each in cards:
                    show_card(each, of=reading)


def show_figures(
    chosen: ChosenRuns,
    question: str,
    *,
    before: Mapping[str, Callable[[ChosenRuns], None]] | None = None,
    after: Mapping[str, Callable[[ChosenRuns], None]] | None = None,
) -> None:
    """Figures of the chosen section of a question, curves before heat maps, under their controls.

    ``chosen``: the chosen runs; they feed at least one of its figures.
    ``question``: A question of the register of figures.
    ``before, after``: sections that draw themselves, before and after those of the figures.
    """
    figures = chosen.figures(question)
    first, last = before or {}, after or {}
    own = {**first, **last}
    sections = [*first, *dict.fromkeys(kind.section for kind in figures.values()), *last]
    section = choose_section(sections) if len(sections) > 1 else sections[0]
    if section in own:
        own[section](chosen)
        return
    kinds = [kind for kind in figures.values() if kind.section == section]
    selection = choose(kinds, chosen.analyses)
    # Curves overlay all runs; a heat map has room for one, which is chosen right above the heat maps.
    curves = [kind for kind in kinds if "run" not in kind.uses]
    heat_maps = [kind for kind in kinds if "run" in kind.uses]
    if heat_maps:
        selection["run"] = chosen_run(chosen.feeding(*(kind.needs for kind in heat_maps)))
    show_in_rows(curves, chosen, selection)
    show_in_rows(heat_maps, chosen, selection)
    show_on_request(chosen, question, section)


def show_on_request(chosen: ChosenRuns, question: str, section: str = "") -> None:
    """Figures whose metrics are computed only when they are named, with a button that computes them.

    ``question``: A question of the register of figures.
    """
    metrics = [
        name
        for kind in FIGURES.values()
        if (kind.question, kind.section) == (question, section)
        for name in kind.needs
        if not CATALOGUE[name].default
    ]
    offer_metrics(chosen.readings.values(), list(dict.fromkeys(metrics)), key=f"request_{question}")


def show_in_rows(
    kinds: Sequence[FigureKind],
    chosen: ChosenRuns,
    selection: dict[str, Any],
    *,
    change: Callable[[Figure], Figure] | None = None,
) -> None:
    """Figures of some kinds in rows of two.

    ``change``: applied to every figure before it is drawn.
    """
    figures = {f"chart_{kind.name}": build(kind, chosen.analyses, selection) for kind in kinds}
    cards_in_rows({key: figure if change is None else change(figure) for key, figure in figures.items()})


def cards_in_rows(figures: Mapping[str, Figure]) -> None:
    """Figures in rows of two.

    ``figures``: key of its card → figure.
    """
    cards = list(figures.items())
    for first in range(0, len(cards), 2):
        # A row of columns for each pair: in two long columns a tall card would move all that follow out of line.
        for column, (key, figure) in zip(st.columns(2), cards[first : first + 2], strict=False):
            with column:
                card(figure, key=key, height=430 if isinstance(figure, Heatmap) else 300)
