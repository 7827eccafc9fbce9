"""What does a person read of a finding? One card: the verdict, where, why, and what to do next, in at most twelve lines."""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from depthscope.app.text.bibliography import cited, source_words
from depthscope.app.text.causes import cause_lines, place_of
from depthscope.app.text.sparkline import curve_blocks, curve_words
from depthscope.diagnostics import Finding
from depthscope.diagnostics.schema import UNPROVEN

__all__ = ["ABOUT_THE_READING", "CARD_SCHEMA", "Card", "card_lines", "card_of", "place_of"]

ABOUT_THE_READING = "About the reading of the network"
"""Heads the findings that say how far a run can be trusted, after those about the network."""

CARD_SCHEMA = "depthscope.finding/1"
"""Name and version of the form in ``--json``: a key that goes or changes its meaning makes a new version."""

MOST_LINES = 12
"""A card that is longer is not read."""

WIDTH, LABELS = 100, 15
"""Columns of a card where their number is unknown, and those of its labels."""


@dataclass(frozen=True)
class Card:
    """A finding as every face shows it: terminal, report, dashboard, notebook and JSON.

    ``finding``: what was judged.
    ``title``: the verdict as a statement about the network.
    ``where``: such as ``depth 3–7, stream 2``, or ``whole run``.
    ``why``: the sentence with its numbers, sources by author and year.
    ``limit``: where the limit comes from, where the sentence does not say it.
    ``unproven``: why the reading of the network is not proven; empty where it is.
    ``next``: what to try.
    ``experiment``: the command of the experiment that would settle it; empty where there is none.
    ``result``: what that experiment gave, once it was run.
    """

    finding: Finding
    title: str
    where: str
    why: str
    limit: str
    unproven: str
    next: str
    experiment: str = ""
    result: str = ""

    @property
    def severity(self) -> str:
        """FAIL, WARN, INFO or PASS."""
        return self.finding.severity.name

    @property
    def curve(self) -> str:
        """What the curve of the numbers that were judged shows, as a phrase; empty for a single number."""
        return curve_words(self.finding)

    @property
    def follows(self) -> str:
        """The finding that this one follows from, as a phrase; empty for none."""
        return self.finding.because.replace("_", " ")

    @property
    def more(self) -> str:
        """Equation, limits and sources of the verdict; empty for a verdict of somebody else."""
        from depthscope.app.text.explanations import explanation
        from depthscope.diagnostics.verdicts import VERDICTS

        return explanation(self.finding.verdict) if self.finding.verdict in VERDICTS else ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, as the published schema states them (``docs/schemas/finding.v1.json``)."""
        return {
            "schema": CARD_SCHEMA,
            **self.finding.as_dict(),
            "title": self.title,
            "where": self.where,
            "why": self.why,
            "next": self.next,
            "experiment": self.experiment or None,
            "result": self.result or None,
            "curve": self.curve or None,
            "profile": [each if math.isfinite(each) else None for each in self.finding.profile],
            "more": self.more,
        }


def card_of(finding: Finding, *, experiment: str = "", result: str = "") -> Card:
    """The card of a finding.

    ``experiment, result``: the command of the experiment that would settle it, and what it gave.
    """
    from depthscope.diagnostics.verdicts import VERDICTS
    from depthscope.diagnostics.verdicts.reading import unproven_sentence

    known = VERDICTS.get(finding.verdict)
    # A verdict of somebody else has no declaration here; its name is all that is known.
    title = known.title if known else f"{finding.verdict.replace('_', ' ').capitalize()}."
    if finding.settled == "not settled":
        title = f"Suspected: {title[0].lower()}{title[1:]}"
    return Card(
        finding=finding,
        title=title,
        where=place_of(finding),
        why=cited(finding.sentence.replace(unproven_sentence(finding.proof), "").rstrip()),
        limit="" if finding.source in finding.sentence else f"Limit: {source_words(finding.source)}.",
        unproven=finding.proof.removeprefix(UNPROVEN) if finding.proof.startswith(UNPROVEN) else "",
        next=finding.advice,
        experiment=experiment,
        result=result,
    )


def card_lines(card: Card, *, width: int = WIDTH, shown: Callable[[str], str] = str) -> list[str]:
    """A card as text of at most twelve lines; narrower ones have more.

    ``shown``: gives a text as the terminal can print it, such as `terminal.encodable`.
    """
    explained = f", follows from {card.follows}" if card.follows else ""
    blocks = curve_blocks(card.finding)
    rows = [
        ("Where", f"{card.where}{explained}", 1),
        ("Curve", f"{blocks}  {card.curve}" if blocks else "", 1),
        ("Why", f"{card.why} {card.limit}".rstrip(), 5 - bool(card.unproven) - bool(blocks)),
        ("Unproven", card.unproven, 1),
        ("Next", card.next, 3),
        ("Result", card.result, 1),
    ]
    lines = _wrapped(shown(f"{card.severity:<4}  {card.title}"), width, "", " " * 6)
    for label, text, most in rows:
        if text:
            room = math.ceil(most * (WIDTH - LABELS) / max(width - LABELS, 1))
            lines += _part(label, shown(text), room, width, shown(" …"))
        if label == "Next" and card.experiment:
            lines += _command(shown(card.experiment), width)
    return lines


def _wrapped(words: str, width: int, first: str, later: str) -> list[str]:
    return textwrap.wrap(
        words,
        width,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=width < WIDTH,
        break_on_hyphens=False,
    )


def _part(label: str, text: str, most: int, width: int, more: str) -> list[str]:
    """One part of a card under its label; what does not fit into its lines is left out, whole sentences where possible."""

    def wrapped(words: str) -> list[str]:
        return _wrapped(words, width, f"      {label:<9}", " " * LABELS)

    lines = wrapped(text)
    # Half a sentence may say the contrary of all of it; the rest is in the JSON.
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", text)
    while len(lines) > most and len(sentences) > 1:
        sentences.pop()
        lines = wrapped(" ".join(sentences) + more)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][: width - len(more)].rstrip() + more]
    return lines


def _command(command: str, width: int) -> list[str]:
    """A command over as many lines as it needs, to copy as it is: a word, such as a path, is never broken."""
    lines: list[str] = []
    for word in map(shlex.quote, shlex.split(command)):
        fits = lines and len(lines[-1]) + len(word) + 3 <= width
        if fits or (lines and len(word) > width - LABELS):
            lines[-1] += f" {word}"
        else:
            lines.append(" " * LABELS + word)
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def cards_text(cards: Iterable[Card], *, width: int = WIDTH, shown: Callable[[str], str] = str) -> str:
    """Cards one below the other, with an empty line between them."""
    cards = list(cards)
    parts, heading = [], shown(ABOUT_THE_READING)
    for card in cards:
        if card.finding.about == "reading" and heading not in parts:
            parts.append(heading)
        parts.append("\n".join(card_lines(card, width=width, shown=shown)))
    graph = cause_lines([card.finding for card in cards])
    if graph:
        lines = [_wrapped(shown(line), width, " " * 6, " " * 12) for line in graph]
        parts.append("\n".join(["What follows from what", *(part for line in lines for part in line)]))
    return "\n\n".join(parts)
