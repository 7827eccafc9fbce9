"""In which state is every verdict of a run? Failed, warned, noted, passed, not judged and why, or that it does not apply."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from depthscope.app.readings.readings import Reading
from depthscope.diagnostics import Finding
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.schema import OF_STREAMS
from depthscope.diagnostics.verdicts import VERDICTS, Verdict, last_step

NOT_JUDGED = "NOT JUDGED"
"""The state of a verdict that is neither passed nor failed: something was not measured, or is not defined."""

DOES_NOT_APPLY = "DOES NOT APPLY"
"""The state of a verdict whose question does not arise for the network."""

ONE_STREAM = "the network has one stream"


@dataclass(frozen=True)
class Standing:
    """One verdict about one run."""

    state: str  # ``FAIL``, ``WARN``, ``INFO``, ``PASS``, `NOT_JUDGED` or `DOES_NOT_APPLY`
    # the worst one of the verdict, of several streams; None where it was not judged
    finding: Finding | None = None
    reason: str = ""  # why it was not judged, or does not apply


def standings(reading: Reading) -> dict[str, Standing]:
    """The state of every verdict for a run.

    Returns: In the order of the register of verdicts.
    """
    worst: dict[str, Finding] = {}
    for finding in (*reading.findings, *reading.passed):  # the worst first
        worst.setdefault(finding.verdict, finding)
    return {name: _standing(verdict, worst.get(name), reading) for name, verdict in VERDICTS.items()}


def not_judged(found: Mapping[str, Standing], state: str = NOT_JUDGED) -> dict[str, list[str]]:
    """Verdicts that were not judged, by the reason; or those that do not apply.

    Returns: Reason → verdicts; the reason of most of them first.
    """
    reasons: dict[str, list[str]] = {}
    for name, standing in found.items():
        if standing.state == state:
            reasons.setdefault(standing.reason, []).append(name)
    return dict(sorted(reasons.items(), key=lambda item: -len(item[1])))


def counts_of(found: Iterable[Standing]) -> dict[str, int]:
    """How many verdicts are in each state; for a line of the terminal."""
    counts = Counter(standing.state for standing in found)
    missing, idle = counts[NOT_JUDGED], counts[DOES_NOT_APPLY]
    return {"judged": counts.total() - missing - idle, "not judged": missing, "do not apply": idle}


def counts_words(found: Iterable[Standing]) -> str:
    """The counts in a line, such as ``41 judged, 3 not judged, 11 do not apply``."""
    counts = counts_of(found)
    return ", ".join(f"{count} {words}" for words, count in counts.items() if count or words == "judged")


def _standing(verdict: Verdict, finding: Finding | None, reading: Reading) -> Standing:
    if finding is not None:
        return Standing(finding.severity.name, finding)
    family, missing = reading.analysis.attrs.get("family"), verdict.missing(reading.analysis)
    if family in verdict.not_for:
        return Standing(DOES_NOT_APPLY, reason=f"the question has no meaning for {family}")
    if _is_about_streams(verdict) and _has_one_stream(reading):
        return Standing(DOES_NOT_APPLY, reason=ONE_STREAM)
    if missing:
        return Standing(NOT_JUDGED, reason=_missing_words(missing, verdict, reading))
    if verdict.profiles(last_step(reading.analysis)):
        return Standing(NOT_JUDGED, reason="its numbers are not defined")
    if verdict.needs == ("attrs",) and verdict.about == "network":
        # The capture looks for it in the code; of weight files alone, or where it cannot look, it writes nothing either.
        return Standing(NOT_JUDGED, reason="nothing of the kind was seen in the forward")
    return Standing(DOES_NOT_APPLY, reason="the question does not arise")


def _is_about_streams(verdict: Verdict) -> bool:
    """Whether it is about how several streams are mixed, read and written, or about how they differ."""
    metric = CATALOGUE.get(verdict.metric)  # none of a null
    return metric is not None and (
        bool(set(OF_STREAMS) & set(metric.roots)) or metric.name.endswith("stream_cosine")
    )


def _has_one_stream(reading: Reading) -> bool:
    attrs = reading.analysis.attrs
    return bool(attrs.get("n_streams") == 1 and attrs.get("family") == "residual")


def _missing_words(missing: list[str], verdict: Verdict, reading: Reading) -> str:
    reasons = reading.analysis.attrs.get("not_computed", {})
    # A variable that is no metric of its own, such as a null, is missing where its metric is.
    known = next((str(reasons[metric]) for metric in (*missing, verdict.metric) if metric in reasons), "")
    return known or f"the run has no {', '.join(missing)}"
