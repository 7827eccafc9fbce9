"""Does what a verdict suspects do harm, and how much? A finding is loud where its consequence is shown.

One rule for all: the statistic is compared with its reference (the limits, and what came in); what is beyond them is a
suspicion; the experiment of `SETTLED_BY` that the run has of it decides. What may be left out, replaced or merged at no cost
is of no use, and the finding keeps its severity; what costs something is of use, and the finding is a note. Without a result
it is one step milder and says that it was not settled.

One scale for all: a WARN costs a part, a FAIL leaves next to nothing. What is lost is read off where it is measured: of the
gradient, or of the differences that came in, by the limits of the verdict; of the loss by two rules here. An experiment that
takes the harm away and regains half of what could be had makes a FAIL; and so does a loss that is no better than that of a
constant answer, whatever the finding, since nothing is left of what the network has learned. What is not finite is a FAIL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from depthscope.diagnostics.experiments import consequence_words
from depthscope.diagnostics.numbers import number
from depthscope.diagnostics.verdicts.age import (
    KNOWS,
    NOTHING_LEARNED,
    Age,
    knows_frequencies_alone,
    number_or_none,
    share_of_constant,
    task_of,
)
from depthscope.diagnostics.verdicts.finding import Finding, Severity

CONSEQUENCES = "consequences"
"""Attribute of a run: the results of the experiments that its suspicions named, one mapping each."""

SHOWN, REFUTED, OPEN = "shown", "refuted", "not settled"

# What a change costs is nothing where it is below this share of what the network has learned, and always below 0.01 nats.
COSTS, LEAST_COST = 0.05, 0.01
# Of what a network could do without the harm: from this share on next to nothing is left.
LOST = 0.5
# Of a network whose loss shows nothing, the output must stay.
SAME_OUTPUT = 0.15

ADVICE = "settle it with depthscope.settle(run, model, batch)"


def weighed(finding: Finding, attrs: Mapping[str, Any], chain: str) -> Finding:
    """The finding of a suspicion with the severity that its consequence gives it; as it is where none was measured."""
    result = _result_of(finding, attrs, chain)
    if finding.severity <= Severity.INFO or result is None or "why" in result:
        return finding
    harm, reason = _is_harm(result, attrs)
    told = f"{finding.sentence} {consequence_words(result)}{reason}"
    if harm is None:
        milder = Severity(finding.severity - 1)
        return replace(finding, settled=OPEN, severity=milder, sentence=told)
    if harm:
        severity = Severity.FAIL if _regained(result, attrs) > LOST else finding.severity
        return replace(finding, settled=SHOWN, severity=severity, sentence=told)
    return replace(finding, settled=REFUTED, severity=Severity.INFO, sentence=told)


def unsettled(finding: Finding, attrs: Mapping[str, Any], chain: str) -> Finding:
    """A loud suspicion of which no consequence was measured: one step milder, and it says why."""
    if finding.severity <= Severity.INFO or finding.settled:
        return finding
    result = _result_of(finding, attrs, chain)
    why = f": {result['why']}" if result else f"; {ADVICE}"
    return replace(
        finding,
        severity=Severity(finding.severity - 1),
        settled=OPEN,
        sentence=f"{finding.sentence} Suspected, and not settled{why}.",
    )


def graded(finding: Finding, attrs: Mapping[str, Any], age: Callable[[], Age]) -> Finding:
    """A loud finding about a network of which nothing is left that it learned is a failure, and says so."""
    share = share_of_constant(attrs)
    # What weighs the loss itself has done so.
    weighs_the_loss = finding.metric == "loss" and finding.axis == "run"
    is_loud = finding.severity == Severity.WARN and finding.about == "network" and not weighs_the_loss
    if not is_loud or share is None or share < NOTHING_LEARNED or not age().trained:
        return finding
    told = f"The loss is {100 * share:.0f} % of that of a constant answer: nothing is left of what the network learned."
    return replace(finding, severity=Severity.FAIL, sentence=f"{finding.sentence} {told}")


def _regained(result: Mapping[str, Any], attrs: Mapping[str, Any]) -> float:
    """What the loss gains without the harm, as a share of what then is below the loss of a constant answer, or of guessing."""
    task, base = task_of(attrs), result.get("loss")
    most = number_or_none(task.get("constant", task.get("guessing")))
    gained = -(result.get("loss_change") or 0.0)
    if base is None or most is None or gained <= max(LEAST_COST, result.get("half_width") or 0.0):
        return 0.0
    could = most - base + gained
    return (
        gained / could if could > LEAST_COST else 0.0
    )  # without the harm it is no better than that answer either


def _result_of(finding: Finding, attrs: Mapping[str, Any], chain: str) -> Mapping[str, Any] | None:
    """The result of the experiment at the finding's place; a file may have anything in its place."""
    results = attrs.get(CONSEQUENCES)
    for result in results if isinstance(results, (list, tuple)) else ():
        if not isinstance(result, Mapping):
            continue
        same = (result.get("verdict"), result.get("chain"), result.get("stream"))
        if same != (finding.verdict, chain, finding.stream):
            continue
        if finding.axis == "run" or (result["first"] <= finding.last and finding.first <= result["last"]):
            return result
    return None


def _is_harm(result: Mapping[str, Any], attrs: Mapping[str, Any]) -> tuple[bool | None, str]:
    """Whether what the finding is about is of no use, or does harm, and what the reader needs to know to see why.

    None where the loss would have to tell, and cannot: a network that has learned nothing does no better without the harm.
    """
    cost, base = result.get("loss_change"), result.get("loss")
    task = task_of(attrs)
    guessing = number_or_none(task.get("guessing"))
    frequencies = knows_frequencies_alone(task, base)
    informed = base is not None and (guessing is None or base < KNOWS * guessing) and not frequencies
    if cost is not None and base is not None and informed:
        scale = abs(base) if guessing is None else guessing - base
        return cost <= max(LEAST_COST, COSTS * scale), ""
    at_chance = (
        ""
        if cost is None or base is None
        else f" The loss, {number(base)}, is no better than guessing, and shows nothing."
    )
    if result.get("claim") == "harmful":
        return None if frequencies and at_chance else True, at_chance
    return (result.get("output_change") or 0.0) <= SAME_OUTPUT, at_chance
