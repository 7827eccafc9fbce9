"""Is a finding certain? Whether it would still be one anywhere in the interval of the numbers that it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import xarray as xr

from depthscope.diagnostics.metrics.intervals import DEGREES, LEVEL, half_width
from depthscope.diagnostics.verdicts.declaration import Verdict
from depthscope.diagnostics.verdicts.finding import Finding, Severity


def findings(verdict: Verdict, analysis: xr.Dataset) -> list[Finding]:
    """The findings of a verdict, those that lie within the uncertainty of their numbers marked as not decided.

    Every number that the verdict takes and that has a standard error over sequences is moved to both ends of its 95 %
    interval, together and one by one, and the verdict is asked again. What passes at one of the ends is not decided: the
    same network may pass with other sequences. It becomes a note.
    """
    found = verdict.findings(analysis)
    names = [name for name in (*verdict.needs, *verdict.wants) if _has_interval(analysis, name)]
    if not names or not any(finding.severity > Severity.INFO for finding in found):
        return found
    ends = [verdict.findings(_moved(analysis, moves)) for moves in _ends(names)]
    return [
        _undecided(finding, min(int(analysis[f"{name}_stderr"].attrs[DEGREES]) for name in names))
        if finding.severity > Severity.INFO and any(_passes(end, finding) for end in ends)
        else finding
        for finding in found
    ]


def _has_interval(analysis: xr.Dataset, name: str) -> bool:
    return f"{name}_stderr" in analysis and DEGREES in analysis[f"{name}_stderr"].attrs


def _ends(names: list[str]) -> Iterator[dict[str, float]]:
    """By how many half widths each number is moved: all of them together, and one by one."""
    for sign in (-1.0, 1.0):
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


def _undecided(finding: Finding, degrees: int) -> Finding:
    advice = "capture more sequences to decide it"
    return replace(
        finding,
        severity=min(finding.severity, Severity.INFO),
        undecided=f"not decided: {advice}",
        explains=False,
        sentence=(
            f"{finding.sentence} Not decided: within the {100 * LEVEL:g} % interval over {degrees + 1} sequences it may be "
            f"on the other side of its limit; {advice}."
        ),
    )
