"""How do a page's figures stand together? Findings, controls, curves, heat maps."""

from __future__ import annotations

import streamlit as st

from depthscope.app.dashboard.components.chart import build, card
from depthscope.app.dashboard.components.controls import choose, choose_section, chosen_run
from depthscope.app.dashboard.components.finding_card import show_finding
from depthscope.app.dashboard.components.markdown import plain, within
from depthscope.app.dashboard.state.chosen_runs import Desk
from depthscope.app.figures import FIGURES, FigureKind, Heatmap
from depthscope.app.figures.build.values import feeds
from depthscope.app.text.bibliography import cited

__all__ = ["show_figures", "show_in_rows", "show_question", "tell_on_request"]


def show_question(found: Desk, question: str) -> None:
    """Findings of the chosen runs that belong to a page, folded.

    Parameters
    ----------
    found : Desk
        The chosen runs.
    question : str
        The page.
    """
    kinds = [kind for kind in FIGURES.values() if kind.question == question]
    metrics = {name for kind in kinds for name in (*kind.needs, *kind.also)}
    for name, reading in found.readings.items():
        mine = [finding for finding in reading.findings if finding.metric in metrics]
        if mine:
            with st.expander(f"{plain(name)}: {plain(cited(mine[0].sentence))}"):
                for finding in mine:
                    show_finding(finding)


def show_figures(found: Desk, question: str) -> None:
    """Figures of the chosen section of a page, two beside each other, under their controls.

    Parameters
    ----------
    found : Desk
        The chosen runs.
    question : str
        The page.
    """
    whole = found.kinds(question)
    sections = list(dict.fromkeys(kind.section for kind in whole.values()))
    section = choose_section(sections) if len(sections) > 1 else sections[0]
    kinds = [kind for kind in whole.values() if kind.section == section]
    selection = choose(kinds, found.analyses)
    maps = [kind for kind in kinds if "run" in kind.uses]
    if maps:
        able = [
            name for name, data in found.analyses.items() if any(feeds(data, kind.needs) for kind in maps)
        ]
        selection = selection | {"run": chosen_run(able)}
    show_in_rows([kind for kind in kinds if kind not in maps], found, selection)
    show_in_rows(maps, found, selection)
    tell_on_request(found, question, section)


def tell_on_request(found: Desk, question: str, section: str = "") -> None:
    """Say which figures need metrics that were left out for their cost, and the command that gives them.

    Parameters
    ----------
    found : Desk
        The chosen runs.
    question : str
        The page.
    section : str
        Its section.
    """
    costly = {str(name) for data in found.analyses.values() for name in data.attrs.get("on_request", ())}
    absent = [
        kind
        for name, kind in FIGURES.items()
        if kind.question == question
        and kind.section == section
        and name not in found.kinds(question)
        and set(kind.needs) & costly
    ]
    if absent:
        titles = ", ".join(within(kind.title) for kind in absent)
        names = ",".join(name for kind in absent for name in kind.needs)
        st.caption(plain(f"On request, since it costs more: {titles}. Name the metrics to have them:"))
        st.code(f"depthscope analyze RUN.nc --metrics {names}", "bash")


def show_in_rows(kinds: list[FigureKind], found: Desk, selection: dict) -> None:
    """Figures in rows of two.

    Parameters
    ----------
    kinds : list of FigureKind
        What to show.
    found : Desk
        The chosen runs.
    selection : dict
        Choices of the controls.
    """
    for first in range(0, len(kinds), 2):
        _row(kinds[first : first + 2], found, selection)


def _row(kinds: list[FigureKind], found: Desk, selection: dict) -> None:
    for column, kind in zip(st.columns(2), kinds, strict=False):
        with column:
            figure = build(kind, found.analyses, selection)
            card(
                figure,
                key=f"chart_{kind.name}",
                height=430 if isinstance(figure, Heatmap) else 300,
                runs=list(found.analyses),
            )
