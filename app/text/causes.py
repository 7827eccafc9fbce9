"""Which findings of a run follow from which? A small graph, as lines of text and as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from depthscope.app.text.numbers import number
from depthscope.diagnostics import Finding, Severity

if TYPE_CHECKING:  # an extra: the terminal's graph needs none
    from markupsafe import Markup

LETTER, ROW, HIGH, GAP, PADDING = 6.7, 34, 24, 46, 10
"""Of the SVG: width of a letter, distance of two rows, height of a box, room for an arrow, room beside a text."""


@dataclass(frozen=True)
class _Box:
    """A verdict in the graph: its words, how bad it is, its column, its row, and the row of its cause."""

    words: str
    severity: Severity
    column: int
    row: int
    cause_row: int | None


def cause_lines(findings: Sequence[Finding]) -> list[str]:
    """The graph as text, each effect below its cause.

    Returns: Empty where no finding follows from another one.

    Examples
    --------
    >>> from depthscope.diagnostics import Severity
    >>> one = Finding("nan", Severity.FAIL, "", "", 1.0, 0.0, "", "depth", 3, 3, "")
    >>> two = Finding("gradient", Severity.INFO, "", "", 1.0, 0.0, "", "run", -1, -1, "", because="nan")
    >>> cause_lines([one, two])
    ['nan, depth 3', '  └ gradient, whole run']
    """
    return [f"{'  ' * box.column}{'└ ' if box.column else ''}{box.words}" for box in _boxes(findings)]


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


def cause_svg(findings: Sequence[Finding]) -> Markup:
    """The graph as SVG, causes on the left and what follows from them on the right.

    Returns: Without references to anything outside; empty where no finding follows from another one.
    """
    from markupsafe import Markup

    boxes = _boxes(findings)
    if not boxes:
        return Markup()
    columns = max(box.column for box in boxes) + 1
    wide = [
        max(LETTER * len(box.words) for box in boxes if box.column == column) + 2 * PADDING
        for column in range(columns)
    ]
    left = [sum(wide[:column]) + GAP * column for column in range(columns)]
    width, height = left[-1] + wide[-1] + 2, ROW * len(boxes)
    shapes = Markup().join(_shape(box, left, wide) for box in boxes)
    words = "; ".join(line.strip().replace("└ ", "from it follows ") for line in cause_lines(findings))
    return Markup(
        '<svg class="causes" xmlns="http://www.w3.org/2000/svg" role="img" '
        'aria-label="{}" viewBox="0 0 {} {}" width="{}" height="{}">{}</svg>'
    ).format(words, f"{width:.0f}", height, f"{width:.0f}", height, shapes)


def _shape(box: _Box, left: Sequence[float], wide: Sequence[float]) -> Markup:
    """A box, with an arrow from its cause."""
    from markupsafe import Markup

    x, y = left[box.column] + 1, ROW * box.row + (ROW - HIGH) / 2
    middle = y + HIGH / 2
    arrow = Markup()
    if box.cause_row is not None:
        start_x, start_y = left[box.column - 1] + wide[box.column - 1] + 1, ROW * (box.cause_row + 0.5)
        turn = x - GAP / 2
        arrow = Markup(
            f'<path class="edge" d="M{start_x:.0f} {start_y:.0f} H{turn:.0f} V{middle:.0f} H{x - 1:.0f} m-6 -4 l6 4 l-6 4"/>'
        )
    return arrow + Markup(
        '<g class="{}"><rect class="box" x="{:.0f}" y="{:.0f}" width="{:.0f}" height="{}" rx="4"/>'
        '<text x="{:.0f}" y="{:.0f}">{}</text></g>'
    ).format(
        box.severity.name.lower(),
        x,
        y,
        wide[box.column],
        HIGH,
        x + PADDING,
        middle + 4,
        box.words,
    )


def _boxes(findings: Sequence[Finding]) -> list[_Box]:
    """The verdicts that have a cause or an effect, each effect after its cause."""
    worst = _worst_of_each(findings)
    effects = _effects(worst)
    boxes: list[_Box] = []
    placed: set[str] = set()

    def place(name: str, column: int, cause_row: int | None) -> None:
        # Two findings may explain each other: the second time it is drawn already.
        if name in placed:
            return
        placed.add(name)
        found, row = worst[name], len(boxes)
        words = f"{name.replace('_', ' ')}, {place_of(found)}"
        boxes.append(_Box(words, found.severity, column, row, cause_row))
        for effect in effects.get(name, ()):
            place(effect, column + 1, row)

    for name in _roots(worst, effects):
        place(name, 0, None)
    return boxes


def _worst_of_each(findings: Sequence[Finding]) -> dict[str, Finding]:
    """By verdict: its worst finding, which represents those of other streams."""
    worst: dict[str, Finding] = {}
    for finding in findings:
        if finding.verdict not in worst or finding.severity > worst[finding.verdict].severity:
            worst[finding.verdict] = finding
    return worst


def _effects(worst: dict[str, Finding]) -> dict[str, list[str]]:
    """By verdict: those that follow from it."""
    effects: dict[str, list[str]] = {}
    for name, finding in worst.items():
        if finding.because in worst and finding.because != name:
            effects.setdefault(finding.because, []).append(name)
    return effects


def _roots(worst: dict[str, Finding], effects: dict[str, list[str]]) -> Iterator[str]:
    """Causes that follow from nothing else, then those of a circle, in which each follows from another."""
    caused = {name for names in effects.values() for name in names}
    yield from (name for name in effects if name not in caused)
    yield from (name for name in worst if name in effects)
