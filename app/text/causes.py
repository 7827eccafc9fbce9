"""Where is a finding, and which findings of a run follow from which? As lines of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from depthscope.app.text.numbers import number
from depthscope.diagnostics import Finding


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
    worst = _worst_of_each(findings)
    effects = _effects(worst)
    lines: list[str] = []
    placed: set[str] = set()

    def place(name: str, column: int) -> None:
        # Two findings may explain each other: the second time it is there already.
        if name in placed:
            return
        placed.add(name)
        lines.append(
            f"{'  ' * column}{'└ ' if column else ''}{name.replace('_', ' ')}, {place_of(worst[name])}"
        )
        for effect in effects.get(name, ()):
            place(effect, column + 1)

    for name in _roots(worst, effects):
        place(name, 0)
    return lines


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
