"""Which figures answer the questions of a paper? Eight of several panels, of whatever the runs can feed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import xarray as xr

from depthscope.app.figures.build.values import level_of
from depthscope.app.figures.composed.panels import Composed, LetteredPanel, Subjects, groups_of, in_one_line
from depthscope.app.figures.composed.questions import QUESTIONS, Question
from depthscope.app.figures.specification import Selection
from depthscope.app.readings.readings import Reading
from depthscope.app.text.numbers import consecutive, number

__all__ = [
    "QUESTIONS",
    "Composed",
    "LetteredPanel",
    "Question",
    "Subjects",
    "compose",
    "in_one_line",
    "letter",
]


EVERYWHERE = "at every position of every run"
"""How the reason ends why a panel is left out that would show nothing but a level."""


def compose(
    name: str,
    readings: Sequence[Reading],
    *,
    view: Selection | None = None,
    runs: Mapping[str, xr.DataTree] | None = None,
    by: str = "",
) -> Composed:
    """A composed figure of some runs, with the panels that they can feed.

    ``readings``: runs, in the order of their colours.
    ``view``: which version of the numbers, as far as a panel does not fix it.
    ``runs``: the runs in memory, by the names that `read_runs` was given; those of a path are opened where a panel
    needs more than the analysis.
    ``by``: attribute that the runs of a group share, such as ``"family"`` of several seeds: curves are then means
    over the runs of a group with their 95 % interval, and marked where two groups differ.
    Returns: Without any panel where the runs feed none; ``left_out`` has the reasons.
    """
    subjects = Subjects(tuple(readings), runs or {}, groups_of(readings, by))
    return composed_of(QUESTIONS[name], subjects, view or Selection())


def composed_of(question: Question, subjects: Subjects, view: Selection, *, varied: bool = False) -> Composed:
    """As `compose`, sharing what it read; `varied` leaves out panels whose curves are the same everywhere, and says so."""
    panels: list[LetteredPanel] = []
    left_out: dict[str, list[str]] = {}
    for recipe in question.recipes:
        made = recipe.panels(subjects, view)
        if isinstance(made, str):
            left_out.setdefault(recipe.title, []).append(made)
            continue
        for panel in made:
            level = level_of(panel.content) if varied else None
            if level is None:
                panels.append(panel)
            else:
                left_out.setdefault(panel.title, []).append(f"it is {number(level)} {EVERYWHERE}")
    return Composed(
        name=question.name,
        title=question.title,
        panels=tuple(panels),
        runs=subjects.shown,
        caption=_caption(panels),
        alt=" ".join(f"({letter(place)}) {panel.content.alt}" for place, panel in enumerate(panels)),
        left_out={title: in_one_line(reasons) for title, reasons in left_out.items()},
    )


def letter(place: int) -> str:
    """The letter of a panel: a to z, then aa, ab and so on."""
    return (letter(place // 26 - 1) if place >= 26 else "") + chr(ord("a") + place % 26)


# A full stop, and what begins a sentence; "et al. 2025" does not.
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+(?=[A-Z±«(])")


def _caption(panels: Sequence[LetteredPanel]) -> str:
    """What each panel shows, and after it once what several of them say, with their letters."""
    said = [
        _BETWEEN_SENTENCES.split(panel.content.caption) if panel.content.caption else [] for panel in panels
    ]
    places: dict[str, list[int]] = {}
    for place, sentences in enumerate(said):
        for sentence in dict.fromkeys(sentences):
            places.setdefault(sentence, []).append(place)
    parts = []
    for place, (panel, sentences) in enumerate(zip(panels, said, strict=True)):
        own = [sentence for sentence in sentences if len(places[sentence]) == 1]
        parts.append(" ".join([f"({letter(place)}) {_capital(panel.title)}.", *own]))
    shared: dict[str, list[str]] = {}
    for sentence, among in places.items():
        if len(among) > 1:
            shared.setdefault("all" if len(among) == len(panels) else _letters(among), []).append(sentence)
    return " ".join([*parts, *(f"({which}) {' '.join(sentences)}" for which, sentences in shared.items())])


def _letters(places: Sequence[int]) -> str:
    """The letters of some panels, as ranges where three or more follow on each other: a-c, e."""
    return ", ".join(
        f"{letter(run[0])}–{letter(run[-1])}" if len(run) > 2 else ", ".join(map(letter, run))
        for run in consecutive(places)
    )


def _capital(text: str) -> str:
    # The capital of σ is another quantity.
    return text[:1].upper() + text[1:] if text[:1].isascii() else text
