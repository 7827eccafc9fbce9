"""What is a finding? One statement about a run: where, how much, against which threshold, and what to try."""

from __future__ import annotations

import math
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

    Parameters
    ----------
    verdict : str
        Name of the verdict, such as ``"rank_collapse"``.
    severity : Severity
        INFO, WARN or FAIL; PASS for a verdict that was met.
    sentence : str
        Plain words with place, number and threshold.
    metric : str
        The metric that the number comes from.
    value, threshold : float
        The worst number found and the limit that it is compared with.
    source : str
        Where the threshold comes from: a key of ``references.bib``, or ``"depthscope's default"``.
    axis : str
        ``"depth"``, ``"connection"``, ``"weight"`` or ``"run"``.
    first, last : int
        First and last position on the axis beyond the limit, inclusive: where it begins and ends; −1 for a run.
    advice : str
        What to try.
    stream : str, optional
        The stream that it is about.
    chain : str
        The chain, where a run has several.
    because : str
        The verdict that explains this finding: of an effect the cause, of what the loss shows where to look first.
    proof : str
        Whether the reading that it is about is proven: ``"proven"``, ``"unproven: …"``, or empty where the run does not say.
    undecided : str
        Where the number is within its uncertainty of the limit, what would decide it; the finding is then no more than INFO.
    quantity : str
        What the number is, in words: ``"mean cosine between streams"``. The metric may be another one that it is made of.
    above : bool
        Whether numbers above the threshold are bad, or those below.
    worst : int
        Position on the axis of the number; −1 for a run.
    scale : {"ratio", "cosine"}
        How far the number is from its limit: by their ratio, or, of cosines, by the ratio of their angles.
    about : {"network", "reading"}
        Whether it is about the network, or only about how far the run can be trusted.
    settled : str
        ``"shown"`` where an experiment, or without labels the output, bore it out, ``"refuted"``, or ``"not settled"``.
    explains : bool
        Whether its number is beyond the limit of a warning, so that it says where to look when the loss shows harm.
    profile : tuple of float
        The numbers that were judged, one for each position on the axis, in the units of `value`; NaN where undefined.
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


def _angle(cosine: float) -> float:
    """The angle, not below what the rounding of 1 − cosine leaves of it."""
    return math.acos(min(max(cosine, -1.0), 1.0 - COSINE_ROUNDING))


class Findings(list[Finding]):
    """Findings in the order to read them; prints one line for each, and shows them as cards in a notebook."""

    def __repr__(self) -> str:
        lines = [f"{each.severity.name} {each.verdict}: {each.sentence}" for each in self]
        return "\n".join(lines) or "nothing found"
