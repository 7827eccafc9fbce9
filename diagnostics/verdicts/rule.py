"""How loud is a number beyond its limits? One rule for every verdict: loud is what does harm, and statistics explain it.

A verdict is of one `Kind`. A *fact* (not finite, cut, discarded, given away) is as loud as its limits say, at any age. What
the *loss* of a trained network shows is loud, and normal before training. A *fresh* network is judged by statistics: what
training needs and lacks, by a published consequence. In a trained one they are notes, since the loss shows what harm they do,
and say where to look when it shows some.

Where the age is not known, a finding is a warning with both readings. Of a network without labels, which may be trained, the
change of the output takes the place of the loss, and the finding is suspected. What an experiment found to be of use is a
note.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from depthscope.diagnostics.experiments import consequence_words
from depthscope.diagnostics.verdicts.age import KNOWS, Age, Task, number_or_none
from depthscope.diagnostics.verdicts.finding import Severity

CONSEQUENCES = "consequences"
"""Attribute of a run: the results of the experiments on what was suspected, one mapping each, see `depthscope.settle`."""

SHOWN, REFUTED, SUSPECTED = "shown", "refuted", "not settled"

# What a change costs is nothing where it is below this share of what the network has learned, and always below 0.01 nats.
COSTS, LEAST_COST = 0.05, 0.01
# Of a network whose loss shows nothing, the output must stay.
SAME_OUTPUT = 0.15


class Kind(Enum):
    """What a verdict rests on, which decides when it is loud."""

    FACT = "a fact, loud at any age"
    LOSS = "what the loss of a trained network shows, loud after training"
    FRESH = "a statistic of what training needs, loud before training"
    READING = "how far the run can be trusted"


class Grade(NamedTuple):
    """How loud a finding is, the sentences that say why, and what an experiment showed."""

    severity: Severity
    words: str = ""
    settled: str = ""


def grade(
    kind: Kind,
    beyond: Severity,
    age: Age,
    attrs: Mapping[str, Any],
    result: Mapping[str, Any] | None = None,
    *,
    is_tried: bool = False,
    is_sure: bool = False,
) -> Grade:
    """How loud a number is.

    ``beyond``: what its limits say.
    ``result``: of the experiment at its place, where one was made.
    ``is_tried``: whether an experiment can show that what it is about is of no use.
    ``is_sure``: whether no network that begins to train is so far beyond.
    """
    if beyond <= Severity.INFO or kind in (Kind.FACT, Kind.READING):
        return Grade(beyond)
    has_loss, is_fresh = Task.of(attrs).share_of_constant is not None, age.trained is False
    if is_fresh:
        normal = f" Normal before training: {age.words}."
        return Grade(Severity.INFO, normal) if kind is Kind.LOSS else Grade(beyond)
    if age.trained and kind is Kind.FRESH and has_loss:
        return Grade(
            Severity.INFO, f" The network is trained ({age.words}): its loss shows what harm this does."
        )
    words, settled = "", ""
    if result is not None:
        settled = SHOWN if _is_of_no_use(result, attrs) else REFUTED
        words = f" {consequence_words(result)}"
        if settled == REFUTED:
            return Grade(Severity.INFO, words, settled)
    elif is_tried and kind is Kind.LOSS:
        beyond, settled = Severity(beyond - 1), SUSPECTED
        words = " Suspected, and not tried; try it with depthscope.settle(run, model, batch)."
    return _with_doubts(Grade(beyond, words, settled), kind, age, is_sure=is_sure, has_loss=has_loss)


def _with_doubts(found: Grade, kind: Kind, age: Age, *, is_sure: bool, has_loss: bool) -> Grade:
    """No more than a warning where the age, or the loss, is not known."""
    severity, words, settled = found
    if severity > Severity.INFO and age.trained is None and not is_sure:
        fault, normal = ("trained", "before training") if kind is Kind.LOSS else ("fresh", "in a trained one")
        words += f" In a {fault} network this is a fault, {normal} it may be normal, and {age.words}."
        severity = Severity.WARN
    if severity > Severity.INFO and not has_loss:
        severity, settled = Severity.WARN, settled or SUSPECTED
    return Grade(severity, words, settled)


def _is_of_no_use(result: Mapping[str, Any], attrs: Mapping[str, Any]) -> bool:
    """Whether a change that takes away what a finding is about costs nothing."""
    cost, loss = number_or_none(result.get("loss_change")), number_or_none(result.get("loss"))
    most = Task.of(attrs).most
    if cost is not None and loss is not None and (most is None or loss < KNOWS * most):
        return cost <= max(LEAST_COST, COSTS * (abs(loss) if most is None else most - loss))
    return (number_or_none(result.get("output_change")) or 0.0) <= SAME_OUTPUT


def result_of(attrs: Mapping[str, Any], verdict: str, first: int, last: int) -> Mapping[str, Any] | None:
    """The result of the experiment on a finding at this place; a file may have anything in its place."""
    results = attrs.get(CONSEQUENCES)
    for result in results if isinstance(results, (list, tuple)) else ():
        if not isinstance(result, Mapping) or not {"first", "last", "depths"} <= set(result):
            continue
        is_here = result.get("verdict") == verdict and result["first"] <= last and first <= result["last"]
        if is_here and "why" not in result:
            return result
    return None
