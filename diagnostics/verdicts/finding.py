"""What is a finding? One statement about a run: where, how much, against which threshold, and what to try."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from typing import Any

COSINE_ROUNDING = 1e-12
"""1 − cosine of states that are the same numbers but for the rounding of float64."""


class Severity(IntEnum):
    """How bad a finding is; PASS is given only where passed verdicts are requested."""

    PASS = 0
    INFO = 1
    WARN = 2
    FAIL = 3


@dataclass(frozen=True)
class Finding:
    """One finding about a run.

    ``verdict``: name of the verdict, such as ``"rank_collapse"``.
    ``severity``: INFO, WARN or FAIL; PASS for a verdict that was met.
    ``sentence``: plain words with place, number and threshold.
    ``metric``: the metric that the number comes from.
    ``value, threshold``: the worst number found and the limit that it is compared with.
    ``source``: where the threshold comes from: a key of ``references.bib``, or ``"depthscope's default"``.
    ``axis``: ``"depth"``, ``"connection"``, ``"weight"`` or ``"run"``.
    ``first, last``: positions on the axis beyond the limit, inclusive: where it begins and ends; −1 for a run.
    ``advice``: what to try.
    ``stream, chain``: the stream that it is about, and the chain, where a run has several.
    ``because``: the verdict that explains this finding: of an effect the cause, of what the loss shows where to look first.
    ``proof``: whether its reading is proven: ``"proven"``, ``"unproven: …"``, or empty where the run does not say.
    ``undecided``: what would decide a number that is within its uncertainty of the limit; the finding is then at most INFO.
    ``quantity``: what the number is, in words. The metric may be another one that it is made of.
    ``above``: whether numbers above the threshold are bad, or those below.
    ``worst``: position on the axis of the number; −1 for a run.
    ``scale``: how far the number is from its limit: ``"ratio"``, or, of cosines, the ratio of their angles.
    ``about``: ``"network"``, or ``"reading"``: how far the run can be trusted.
    ``settled``: ``"shown"`` where an experiment bore it out, ``"refuted"``, or ``"not settled"``; empty where none can.
    ``explains``: whether its number is beyond the limit of a warning, so that it says where to look when the loss shows harm.
    ``profile``: the numbers that were judged, one for each position, in the units of `value`; NaN where undefined.
    """

    verdict: str
    severity: Severity
    sentence: str
    metric: str
    value: float
    threshold: float
    source: str
    axis: str
    first: int
    last: int
    advice: str
    stream: str | None = None
    chain: str = ""
    because: str = ""
    proof: str = ""
    undecided: str = ""
    quantity: str = ""
    above: bool = True
    worst: int = -1
    scale: str = "ratio"
    about: str = "network"
    settled: str = ""
    explains: bool = field(default=False, compare=False, repr=False)
    # Not compared: NaN is not equal to itself, and two findings with the same number at the same place are the same.
    profile: tuple[float, ...] = field(default=(), compare=False, repr=False)

    @property
    def excess(self) -> float:
        """By which factor the number is beyond the threshold; infinite where one of them is zero."""
        sizes = abs(self.value), abs(self.threshold)
        if self.scale == "cosine":
            # 0.9999 and 0.99 are nearly the same number, and angles of 0.8° and 8°.
            sizes = _angle(self.value), _angle(self.threshold)
        return max(sizes) / min(sizes) if min(sizes) > 0 else math.inf

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the severity by name, None for what is not finite; without the profile.

        Returns
        -------
        dict of str to object
        """
        plain = asdict(replace(self, profile=())) | {"severity": self.severity.name}
        # A row of a table, and of what is kept of 500 runs: the profile of 1000 depths has no place there.
        del plain["profile"], plain["explains"]
        # JSON has neither NaN nor infinities; Python would write them and other parsers fail.
        for name in ("value", "threshold"):
            if not math.isfinite(plain[name]):
                plain[name] = None
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Finding:
        """The inverse of `as_dict`; other entries are passed over."""
        known = {name: plain[name] for name in cls.__dataclass_fields__ if name in plain}
        numbers = {name: math.nan if known[name] is None else known[name] for name in ("value", "threshold")}
        return cls(**{**known, **numbers, "severity": Severity[known["severity"]]})


def _angle(cosine: float) -> float:
    """The angle, not below what the rounding of 1 − cosine leaves of it."""
    return math.acos(min(max(cosine, -1.0), 1.0 - COSINE_ROUNDING))


class News:
    """The findings of one step after the other that are new, or more severe than at any step before."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Severity] = {}

    def among(self, findings: Iterable[Finding]) -> list[Finding]:
        """Those of the next step that are."""
        new = []
        for finding in findings:
            # Not by its place or number, which move from step to step.
            key = finding.verdict, finding.chain, finding.stream, finding.quantity
            before = self._known.get(key, Severity.PASS)
            self._known[key] = max(before, finding.severity)
            new += [finding] if finding.severity > before else []
        return new


class Findings(list[Finding]):
    """Findings in the order to read them; prints one line for each, and shows them as cards in a notebook."""

    def __repr__(self) -> str:
        lines = [f"{each.severity.name} {each.verdict}: {each.sentence}" for each in self]
        return "\n".join(lines) or "nothing found"
