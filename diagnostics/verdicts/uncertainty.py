"""Is a finding certain? Whether it would still be one anywhere in the interval of the numbers that it is made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import xarray as xr

from depthscope.diagnostics.metrics.intervals import DEGREES, LEVEL, factor, half_width
from depthscope.diagnostics.verdicts.declaration import Verdict
from depthscope.diagnostics.verdicts.finding import Finding, Severity

MOST_SEQUENCES = 10_000
"""A number that needs more sequences than this to be told from its limit is at the limit."""

STEPS = 6
"""Halvings in the search for the share of the interval that reaches the limit: it is then known to 2 %."""


def findings(verdict: Verdict, analysis: xr.Dataset) -> list[Finding]:
    """The findings of a verdict, those that lie within the uncertainty of their numbers marked as not decided.

    Every number that the verdict takes and that has a standard error over sequences is moved to both ends of its 95 %
    interval, together and one by one, and the verdict is asked again. What passes at one of the ends is not decided: the
    same network may pass with other sequences. It becomes a note with how many sequences would decide it.
    """
    found = verdict.findings(analysis)
    names = [name for name in (*verdict.needs, *verdict.wants) if _has_interval(analysis, name)]
    if not names or not any(finding.severity for finding in found):
        return found
    ends = [verdict.findings(_moved(analysis, moves)) for moves in _ends(names)]
    return [
        _undecided(finding, verdict, analysis, names)
        if finding.severity and any(_passes(end, finding) for end in ends)
        else finding
        for finding in found
    ]


def _has_interval(analysis: xr.Dataset, name: str) -> bool:
    return f"{name}_stderr" in analysis and DEGREES in analysis[f"{name}_stderr"].attrs


def _ends(names: list[str], share: float = 1.0) -> Iterator[dict[str, float]]:
    """By how many half widths each number is moved: all of them together, and one by one."""
    for sign in (-share, share):
        yield dict.fromkeys(names, sign)
        yield from ({name: sign} for name in names if len(names) > 1)


def _moved(analysis: xr.Dataset, moves: dict[str, float]) -> xr.Dataset:
    moved = {}
    for name, share in moves.items():
        # Where there is no error, as for pooled tokens, the number stays.
        reach = half_width(analysis[f"{name}_stderr"]).fillna(0.0)
        moved[name] = (
            (analysis[name] + share * reach)
            .transpose(*analysis[name].dims)
            .assign_attrs(analysis[name].attrs)
        )
    return analysis.assign(moved)


def _passes(end: list[Finding], finding: Finding) -> bool:
    """Whether a verdict passes for the stream of a finding."""
    return all(not other.severity for other in end if other.stream == finding.stream)


def _undecided(finding: Finding, verdict: Verdict, analysis: xr.Dataset, names: list[str]) -> Finding:
    degrees = min(int(analysis[f"{name}_stderr"].attrs[DEGREES]) for name in names)
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        passes = any(
            _passes(verdict.findings(_moved(analysis, moves)), finding) for moves in _ends(names, middle)
        )
        low, high = (low, middle) if passes else (middle, high)
    more = _sequences_needed(degrees + 1, low)
    advice = (
        f"capture about {more} more sequences to decide it"
        if more
        else f"more than {MOST_SEQUENCES} sequences would be needed to tell it from its limit"
    )
    return replace(
        finding,
        severity=min(finding.severity, Severity.INFO),
        undecided=f"not decided: {advice}",
        sentence=(
            f"{finding.sentence} Not decided: within the {100 * LEVEL:g} % interval over {degrees + 1} sequences it may be "
            f"on the other side of its limit; {advice}."
        ),
    )


def _sequences_needed(sequences: int, share: float) -> int:
    r"""How many more sequences narrow the interval to this share of it; 0 where no number of them does.

    :math:`t_{m-1} / \sqrt m \le c\, t_{S-1} / \sqrt S`: their spread is taken to stay as it is.
    """
    reach = share * factor(sequences - 1) / math.sqrt(sequences)
    for number in itertools.chain(range(sequences + 1, 200), range(200, MOST_SEQUENCES, 50)):
        if factor(number - 1) / math.sqrt(number) <= reach:
            return number - sequences
    return 0
