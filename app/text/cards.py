"""What does a person read of a finding? One card: the verdict, where, why, and what to do next, in at most twelve lines."""

from __future__ import annotations

import inspect
import math
import re
import shlex
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from depthscope.app.text.bibliography import Reference, cited, source_words
from depthscope.app.text.numbers import number
from depthscope.diagnostics import CATALOGUE, Finding, Metric
from depthscope.diagnostics.numbers import number as short_number
from depthscope.diagnostics.schema import UNPROVEN
from depthscope.diagnostics.verdicts import VERDICTS, Verdict

ABOUT_THE_READING = "About the reading of the network"
"""Heads the findings that say how far a run can be trusted, after those about the network."""

CARD_SCHEMA = "depthscope.finding/1"
"""Name and version of the form in ``--json``: a key that goes or changes its meaning makes a new version."""

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
    def blocks(self) -> str:
        """That curve as block characters; empty where it is flat."""
        return curve_blocks(self.finding)

    @property
    def follows(self) -> str:
        """The finding that this one follows from, as a phrase; empty for none."""
        return self.finding.because.replace("_", " ")

    @property
    def more(self) -> str:
        """Equation, limits and sources of the verdict; empty for a verdict of somebody else."""
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
    """The card of a finding, with the command of the experiment that would settle it, and what that gave."""
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
    """A card as text of at most twelve lines; narrower ones have more."""
    explained = f", follows from {card.follows}" if card.follows else ""
    blocks = card.blocks
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
    parts, heading = [], shown(ABOUT_THE_READING)
    for card in cards:
        if card.finding.about == "reading" and heading not in parts:
            parts.append(heading)
        parts.append("\n".join(card_lines(card, width=width, shown=shown)))
    return "\n\n".join(parts)


@cache  # decoding the TeX of a source takes a while, and a page asks again each time it is drawn
def explanation(name: str, *, width: int = 100) -> str:
    """A description of a verdict or a metric, with its equation in TeX, its limits and its sources."""
    parts = [_of_verdict(VERDICTS[name])] if name in VERDICTS else []
    # A verdict may judge the null of a metric.
    metric = CATALOGUE.get((VERDICTS[name].metric if name in VERDICTS else name).removesuffix("_null"))
    if metric is not None:
        parts.append(_of_metric(metric))
    else:  # such as the loss, which the training gives
        parts.append(f"Source: {source_words(VERDICTS[name].limits.source)}")
    # Equations are indented, and stay on their line however long they are.
    lines = "\n\n".join(parts).splitlines()
    return "\n".join(line if line.startswith(" ") else textwrap.fill(line, width) for line in lines)


def _of_verdict(verdict: Verdict) -> str:
    lines = [
        verdict.name,
        verdict.title,
        "",
        f"Judges the {verdict.judged} ({source_words(verdict.limits.source)}).",
    ]
    lines.append(f"Rests on {verdict.kind.value}.")
    if verdict.advice:
        lines.append(f"What to try: {verdict.advice}")
    if verdict.follows_from:
        lines.append(f"Explained, where it applies, by: {', '.join(verdict.follows_from)}.")
    return "\n".join(lines)


def _of_metric(metric: Metric) -> str:
    facts = [
        f"Measured by: {metric.name}, {metric.question_text}",
        "",
        _plain(inspect.getdoc(metric.function) or metric.description),
        "",
        f"How it is computed: {metric.estimator}.",
        f"Units: {metric.units}. Basis: {metric.basis}.",
    ]
    if isinstance(metric.null, str):
        facts.append(f"Noise baseline: none; {metric.null}.")
    facts += [f"Source: {cited(key.strip(), form=_full)}" for key in metric.cite.split(",") if key.strip()]
    return "\n".join(facts)


def _plain(docstring: str) -> str:
    """A docstring without the marks of its markup: a paragraph is one line, an equation an indented one."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        words = " ".join(paragraph.split())
        equation = words.removeprefix(".. math:: ")
        paragraphs.append(f"    {equation}" if equation != words else words)
    text = "\n\n".join(paragraphs)
    return re.sub(r":math:`([^`]*)`", r"\1", text).replace("``", "`")


def _full(found: Reference) -> str:
    return " ".join(filter(None, (f"{found.author_year}, {found.title}.", found.url)))


def place_of(finding: Finding) -> str:
    """The place of a finding, such as ``depth 3–7`` or ``whole run``."""
    # A negative position is none.
    if finding.axis == "run" or finding.first < 0:
        place = "whole run"
    elif finding.last == finding.first:
        place = f"{finding.axis} {finding.first}"
    else:
        place = f"{finding.axis} {finding.first}–{finding.last}{_worst_words(finding)}"
    # The mean over streams is not one of them.
    return place if finding.stream in (None, "mean") else f"{place}, stream {finding.stream}"


def _worst_words(finding: Finding) -> str:
    """Where a finding is worst; empty where a reader sees the same number everywhere."""
    judged = [each for each in finding.profile[finding.first : finding.last + 1] if not math.isnan(each)]
    is_somewhere = finding.worst >= 0 and len(judged) > 1 and number(min(judged)) != number(max(judged))
    return f", worst at {finding.worst}" if is_somewhere else ""


# --- the numbers that a verdict judged, as a small curve

BLOCKS = "▁▂▃▄▅▆▇█"
UNDEFINED_BLOCK = "·"

MOST_BLOCKS = 28
"""Of a curve; a longer one has the worst number of each part."""

ROUNDING = 1e-12
"""Of a number near 1, in float64 after some sums."""

DECADES = 1.5
"""From so many powers of ten on the curve is drawn over logarithms: a gain of 1000 would hide all others."""


def _judged(finding: Finding) -> tuple[np.ndarray, float, bool, str]:
    """The numbers that were judged, their limit, whether those above are worse, and words before them."""
    values = np.asarray(finding.profile, dtype=np.float64)
    known = values[np.isfinite(values)]
    # Cosines and similarities may all read 1.00: what differs is their distance from 1, unless that is rounding.
    far = np.abs(1.0 - known).max(initial=0.0) > ROUNDING
    if far and {number(float(each)) for each in known} == {number(1.0)}:
        return 1.0 - values, 1.0 - finding.threshold, not finding.above, "1 − x from "
    return values, finding.threshold, finding.above, ""


def curve_words(finding: Finding) -> str:
    """What the curve of a finding shows, for those who do not see it; empty where the verdict judged a single number."""
    values, limit, above, of = _judged(finding)
    known = values[np.isfinite(values)]
    if len(known) < 2:
        return ""
    low, high = number(float(known.min())), number(float(known.max()))
    reach = f"{of}{low} to {high}" if low != high else f"{of.removesuffix(' from ')} {low} throughout".strip()
    words = f"{finding.axis} 0–{len(values) - 1}: {reach}, worse {'above' if above else 'below'} {short_number(limit)}"
    return f"{words}; {len(values) - len(known)} undefined" if len(known) < len(values) else words


def curve_blocks(finding: Finding) -> str:
    """The curve as block characters, low to high; a dot where it is undefined.

    Returns: At most `MOST_BLOCKS` characters; empty where the verdict judged a single number, or one that is repeated.
    """
    values, _, above, _ = _judged(finding)
    values = np.where(np.isfinite(values), values, np.nan)
    if len({number(float(value)) for value in values[np.isfinite(values)]}) < 2:
        return ""
    if len(values) > MOST_BLOCKS:  # of each part the worst, so that a single peak is not lost
        worst = np.fmax.reduce if above else np.fmin.reduce
        values = np.array([worst(part) for part in np.array_split(values, MOST_BLOCKS)])
    known = values[np.isfinite(values)]
    # A zero among positive numbers has no logarithm: the scale stays linear.
    if known.min() > 0 and known.max() > 10**DECADES * known.min():
        values, known = np.log10(values), np.log10(known)
    heights = (values - known.min()) / max(float(np.ptp(known)), 1e-300)
    return "".join(
        UNDEFINED_BLOCK if np.isnan(height) else BLOCKS[min(int(height * len(BLOCKS)), len(BLOCKS) - 1)]
        for height in heights
    )
