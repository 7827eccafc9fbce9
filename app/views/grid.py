"""How do a page's figures stand together? Findings, controls, curves, heat maps."""

from __future__ import annotations

import streamlit as st

from app.bibliography import cited
from app.figures import FigureKind, Heatmap
from app.figures.values import feeds
from app.views.chart import build, card
from app.views.controls import choose, chosen_run
from app.views.desk import Desk
from app.views.verdict import show_finding
from app.views.words import plain
from diagnostics.catalogue import CATALOGUE

__all__ = ["show_figures", "show_lines", "show_question"]


def show_question(found: Desk, question: str) -> None:
    """Findings of the chosen runs that belong to a page, folded.

    Parameters
    ----------
    found : Desk
        The chosen runs.
    question : str
        The page.
    """
    metrics = {name for name, entry in CATALOGUE.items() if entry.question == question}
    for name, reading in found.readings.items():
        mine = [finding for finding in reading.findings if finding.metric in metrics]
        if mine:
            with st.expander(f"{plain(name)}: {plain(cited(mine[0].sentence))}"):
                for finding in mine:
                    show_finding(finding)


def show_figures(found: Desk, question: str) -> None:
    """Figures of a page, two beside each other, under their controls.

    Parameters
    ----------
    found : Desk
        The chosen runs.
    question : str
        The page.
    """
    kinds = found.kinds(question)
    selection = choose(kinds.values(), found.analyses)
    lines = [kind for kind in kinds.values() if "run" not in kind.uses]
    maps = [kind for kind in kinds.values() if "run" in kind.uses]
    show_lines(lines, found, selection)
    if maps:
        able = [
            name for name, data in found.analyses.items() if any(feeds(data, kind.needs) for kind in maps)
        ]
        _row(maps, found, selection | {"run": chosen_run(able)})


def show_lines(kinds: list[FigureKind], found: Desk, selection: dict) -> None:
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
