"""Was the fault found at its place and with its severity, missed, or was a healthy network blamed?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import xarray as xr

from depthscope import diagnostics
from depthscope.diagnostics import Finding, Severity
from tests.verdicts.faults import Fault
from tests.verdicts.places import Place

# Outcomes of a faulty network; "mild" and "elsewhere" are told, and count as missed.
FOUND, MILD, ELSEWHERE, MISSED = "found", "too mild", "elsewhere", "missed"
# Of a healthy one.
QUIET, ALARM = "quiet", "false alarm"
# Of both: the capture refused the network, or ended in another error.
REFUSED, CRASHED = "refused", "crashed"
RIGHT = (FOUND, QUIET)


@dataclass(frozen=True)
class Outcome:
    """What became of one network."""

    title: str
    words: str
    outcome: str
    told: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)
    seed: int = 0

    @property
    def line(self) -> str:
        told = f": {'; '.join(self.told)}" if self.told else ""
        return f"{self.outcome}: {self.title} [{self.words}; case {self.seed}]{told}"


def by_chain(analysis: xr.Dataset | xr.DataTree) -> dict[str, xr.Dataset]:
    if isinstance(analysis, xr.Dataset):
        return {"": analysis}
    return {name: node.to_dataset() for name, node in analysis.children.items()} or {
        "": analysis.to_dataset()
    }


def loud(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity > Severity.INFO]


def told(findings: Sequence[Finding]) -> tuple[str, ...]:
    return tuple(f"{each.severity.name} {each.verdict}: {each.sentence[:160]}" for each in findings)


def score_fault(
    fault: Fault, place: Place, analysis: xr.Dataset | xr.DataTree
) -> tuple[str, tuple[str, ...]]:
    """The outcome of a planted fault, and what was told instead where it is not found."""
    findings, parts = diagnostics.judge(analysis), by_chain(analysis)
    named = [each for each in findings if each.verdict in fault.says]
    here = [each for each in named if place.holds(each, parts[each.chain])]
    if any(each.severity >= fault.severity for each in here):
        return FOUND, ()
    if here:
        return MILD, told(here)
    if named:
        return ELSEWHERE, (f"planted {place}", *told(named))
    return MISSED, (f"planted {place}", *told(loud(findings)))


def score_healthy(analysis: xr.Dataset | xr.DataTree) -> tuple[str, tuple[str, ...]]:
    """The outcome of a healthy network, and what it was blamed for."""
    blamed = loud(diagnostics.judge(analysis))
    return (ALARM, told(blamed)) if blamed else (QUIET, ())


def clock() -> float:
    return time.process_time()
