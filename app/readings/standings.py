"""In which state is every verdict of a run? Failed, warned, noted, passed, not judged and why, or that it does not apply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from depthscope.app.readings.readings import Reading
from depthscope.diagnostics import Finding
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.schema import OF_STREAMS
from depthscope.diagnostics.verdicts import VERDICTS, Verdict, last_step

NOT_JUDGED, DOES_NOT_APPLY = "NOT JUDGED", "DOES NOT APPLY"
"""States of a verdict: something was not measured or is not defined; its question does not arise for the network."""

ONE_STREAM = "the network has one stream"


class Standing(NamedTuple):
    """One verdict about one run: ``FAIL``, ``WARN``, ``INFO``, ``PASS`` or one of the states above, with its reason."""

    state: str
    reason: str = ""


def standings(reading: Reading) -> dict[str, Standing]:
    """The state of every verdict for a run, in the order of the register of verdicts."""
    worst: dict[str, Finding] = {}
    for finding in (*reading.findings, *reading.passed):  # the worst first
        worst.setdefault(finding.verdict, finding)
    return {
        name: Standing(worst[name].severity.name) if name in worst else _without_finding(verdict, reading)
        for name, verdict in VERDICTS.items()
    }


def by_reason(found: Mapping[str, Standing], state: str) -> dict[str, list[str]]:
    """Verdicts of a state by the reason; the reason of most of them first."""
    reasons: dict[str, list[str]] = {}
    for name, standing in found.items():
        if standing.state == state:
            reasons.setdefault(standing.reason, []).append(name)
    return dict(sorted(reasons.items(), key=lambda item: -len(item[1])))


def counts_words(found: Mapping[str, Standing]) -> str:
    """The counts in a line, such as ``41 judged, 3 not judged, 11 do not apply``."""
    states = [standing.state for standing in found.values()]
    missing, idle = states.count(NOT_JUDGED), states.count(DOES_NOT_APPLY)
    counts = {"not judged": missing, "do not apply": idle}
    judged = f"{len(states) - missing - idle} judged"
    return ", ".join([judged, *(f"{count} {words}" for words, count in counts.items() if count)])


def _without_finding(verdict: Verdict, reading: Reading) -> Standing:
    attrs = reading.analysis.attrs
    family, missing = attrs.get("family"), verdict.missing(reading.analysis)
    # Of how several streams are mixed, read and written, or of how they differ; none of a null.
    metric = CATALOGUE.get(verdict.metric)
    of_streams = metric is not None and (
        bool(set(OF_STREAMS) & set(metric.roots)) or metric.name.endswith("stream_cosine")
    )
    if of_streams and attrs.get("n_streams") == 1 and family == "residual":
        return Standing(DOES_NOT_APPLY, ONE_STREAM)
    if missing:
        # A variable that is no metric of its own, such as a null, is missing where its metric is.
        reasons = attrs.get("not_computed", {})
        known = next((str(reasons[name]) for name in (*missing, verdict.metric) if name in reasons), "")
        return Standing(NOT_JUDGED, known or f"the run has no {', '.join(missing)}")
    if verdict.profiles(last_step(reading.analysis)):
        return Standing(NOT_JUDGED, "its numbers are not defined")
    if verdict.needs == ("attrs",) and verdict.about == "network":
        # The capture looks for it in the code; of weight files alone, or where it cannot look, it writes nothing either.
        return Standing(NOT_JUDGED, "nothing of the kind was seen in the forward")
    return Standing(DOES_NOT_APPLY, "the question does not arise")
