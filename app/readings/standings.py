"""What does every verdict say of a run? Failed, warned, noted, passed, or not judged and why, which is not passed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from depthscope.app.readings.readings import Reading
from depthscope.diagnostics import Finding
from depthscope.diagnostics.verdicts import VERDICTS

__all__ = ["NOT_JUDGED", "Standing", "not_judged", "standings"]

NOT_JUDGED = "NOT JUDGED"
"""The state of a verdict that is neither passed nor failed."""


@dataclass(frozen=True)
class Standing:
    """One verdict about one run.

    Parameters
    ----------
    state : str
        ``FAIL``, ``WARN``, ``INFO``, ``PASS`` or `NOT_JUDGED`.
    finding : Finding or None
        The worst one of the verdict, of several streams; None where it was not judged.
    reason : str
        Why it was not judged.
    """

    state: str
    finding: Finding | None = None
    reason: str = ""


def standings(reading: Reading) -> dict[str, Standing]:
    """The state of every verdict for a run.

    Parameters
    ----------
    reading : Reading
        One chain of one run.

    Returns
    -------
    dict of str to Standing
        In the order of the register of verdicts.
    """
    worst: dict[str, Finding] = {}
    for finding in (*reading.findings, *reading.passed):  # the worst first
        worst.setdefault(finding.verdict, finding)
    return {
        name: Standing(worst[name].severity.name, worst[name])
        if name in worst
        else Standing(NOT_JUDGED, reason=_reason(name, reading))
        for name in VERDICTS
    }


def not_judged(found: Mapping[str, Standing]) -> dict[str, list[str]]:
    """Verdicts that were not judged, by the reason.

    Parameters
    ----------
    found : mapping of str to Standing
        Of `standings`.

    Returns
    -------
    dict of str to list of str
        Reason → verdicts; the reason of most of them first.
    """
    reasons: dict[str, list[str]] = {}
    for name, standing in found.items():
        if standing.state == NOT_JUDGED:
            reasons.setdefault(standing.reason, []).append(name)
    return dict(sorted(reasons.items(), key=lambda item: -len(item[1])))


def _reason(name: str, reading: Reading) -> str:
    verdict = VERDICTS[name]
    missing = verdict.missing(reading.analysis)
    if missing:
        reasons = reading.analysis.attrs.get("not_computed", {})
        # A variable that is no metric of its own, such as a null, is missing where its metric is.
        known = next((str(reasons[metric]) for metric in (*missing, verdict.metric) if metric in reasons), "")
        return known or f"the run has no {', '.join(missing)}"
    family = reading.analysis.attrs.get("family")
    if family in verdict.not_for:
        return f"the question has no meaning for {family}"
    return "the question does not arise, or its numbers are not defined"
