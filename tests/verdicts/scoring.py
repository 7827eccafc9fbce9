"""Is a harmful fault found, and its place; is a harmless or a healthy network blamed?

Of a trained network the loss says what is harmful: planted faults that cost nothing are harmless, and must not be loud. Of a
fresh one the declaration of the fault does, since its loss says nothing yet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import xarray as xr

from depthscope import diagnostics
from depthscope.diagnostics import Finding, Severity
from tests.verdicts.faults import Fault
from tests.verdicts.places import Place

HARMFUL, HARMLESS, HEALTHY = "harmful", "harmless", "healthy"
LOUD, QUIET = "loud", "quiet"
REFUSED, CRASHED = "refused", "crashed"
"""The capture refused the network, or ended in another error."""


@dataclass(frozen=True)
class Outcome:
    """What became of one network: `placed` says whether the place of a harmful fault is named."""

    title: str
    words: str
    group: str
    outcome: str
    told: tuple[str, ...] = ()
    placed: bool = False
    seconds: float = field(default=0.0, compare=False)
    seed: int = 0

    @property
    def is_right(self) -> bool:
        return self.outcome == (LOUD if self.group == HARMFUL else QUIET)

    @property
    def line(self) -> str:
        word = "right" if self.is_right else "wrong"
        place = ", place right" if self.placed else ""
        told = "" if self.is_right and (self.placed or self.group != HARMFUL) else f": {'; '.join(self.told)}"
        return f"{word}: {self.group}, {self.outcome}{place}: {self.title} [{self.words}; case {self.seed}]{told}"


def loud(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity > Severity.INFO]


def told(findings: Sequence[Finding]) -> tuple[str, ...]:
    return tuple(f"{each.severity.name} {each.verdict}: {each.sentence[:160]}" for each in findings)


def score_fault(
    fault: Fault, place: Place, analysis: xr.Dataset | xr.DataTree, *, trained: bool
) -> tuple[str, bool, tuple[str, ...]]:
    """Whether a planted fault is loud, whether its place is named, and what was told."""
    findings, parts = diagnostics.judge(analysis), diagnostics.schema.by_chain(analysis)
    named = [each for each in findings if each.verdict in fault.says]
    placed = any(place.holds(each, parts[each.chain]) for each in named)
    # What the loss of a trained network shows, its statistics explain; of a fresh one they are all that can be loud.
    is_loud = bool(loud(findings if trained else named)) or (bool(named) and fault.severity == Severity.INFO)
    return (
        LOUD if is_loud else QUIET,
        placed,
        (f"planted {place}", *told(findings if named else loud(findings))),
    )


def score_healthy(analysis: xr.Dataset | xr.DataTree) -> tuple[str, tuple[str, ...]]:
    """Whether a healthy network is blamed, and for what."""
    blamed = loud(diagnostics.judge(analysis))
    return (LOUD if blamed else QUIET), told(blamed)


def clock() -> float:
    return time.process_time()
