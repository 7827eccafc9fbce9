"""How old is a network? Facts about its training: the loss against guessing, the step, how far the weights have moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import xarray as xr

TASK = "task"
"""Attribute of a run: what its loss is of: the ``classes``, the loss of ``guessing`` among them, and the ``loss`` itself."""

# Share of the loss of guessing. Below it a network has learned more than how often each class comes.
LEARNED = 0.7
# Share of the loss of a constant answer, from which on nothing is learned of the input, or nothing of it left.
NOTHING_LEARNED = 0.97
# The same share of a network that has surely learned something of the input, which it does after its first steps.
KNOWS = 0.9
# Norms begin at 1; within 0.15 of it a network has made some hundred steps at most, or more at a small learning rate.
YOUNG = 0.15
# Each step moves a gain and a weight of the head by about the learning rate, and a head of 64 features or more needs less than
# this of each to know how often every class comes.
BEGUN = 0.05
# By which factor the loss exceeds what the predictions expect, their entropy, where a network is sure of wrong answers: in its
# first steps it is about as unsure as it is wrong.
SURE = 1.3
# A network that nobody trained may be sure of anything: some gain has to have moved.
TOUCHED = 0.01
# Steps of a recording in which a network that began with large logits may be sure of what it did not learn.
FIRST_STEPS = 50
# Steps of a recording after which nothing is as it was drawn any more.
MANY_STEPS = 300
# ‖W − W₀‖ / ‖W₀‖ of the weight that moved most.
MOVED = 0.1
# The number of steps times the relative change of half of the modules in the last one: after the first steps of a recording,
# and a warm-up, in which they are small, no weight is as it was drawn.
WAY = 0.5


class Age(NamedTuple):
    """Whether a network is past its start; None where no fact tells. Heuristics of ours, each named in the words.

    ``begun``: whether it is past its first steps, in which it learns how often each class comes, or is sure of wrong ones.
    ``grown``: whether its weights have gone so far that it has learned something of its input, if it ever does.
    """

    trained: bool | None
    words: str
    begun: bool = False
    grown: bool = False


def age_of(analysis: xr.Dataset) -> Age:
    """What the facts say, the surest first: what was learned, then how long, then what the weights look like."""
    attrs = analysis.attrs
    moved, share = number_or_none(attrs.get("norms_moved")), share_of_guessing(attrs)
    near, at_first = (moved is not None and moved <= limit for limit in (YOUNG, BEGUN))
    gains = f"its norm gains are still within {moved or 0.0:.2g} of 1"
    step = (number_or_none(analysis["step"].values) if "step" in analysis.coords else None) or 0.0
    # No `get`: for a name that it lacks xarray looks for similar ones, which took half of the time of all verdicts.
    known = {
        name: analysis[name]
        for name in ("first_weight_distance", "stream_cosine", "read_share")
        if name in analysis
    }
    distance = float(known["first_weight_distance"].max()) if "first_weight_distance" in known else 0.0
    # Gains that have moved refute that nothing else has: what a step of training ends is then no start.
    still = moved is None or at_first
    are_one = still and streams_are_one(known.get("stream_cosine"), known.get("read_share"))
    of_guessing = f"the loss is {100 * (share or 0.0):.0f} % of that of guessing"
    facts = (
        (share is not None and share < LEARNED, True, of_guessing),
        (step >= MANY_STEPS, True, f"it has trained for {step:.0f} steps"),
        (distance > MOVED, True, f"its weights have moved by up to {100 * distance:.0f} %"),
        ((moved or 0.0) > YOUNG, True, f"its norm gains are up to {moved or 0.0:.2g} from 1"),
        (attrs.get("untouched"), False, "the weights are as they were drawn"),
        (are_one, False, ONE_STREAM),
        (still and _nothing_is_added(analysis), False, NOTHING_ADDED),
        (attrs.get("small_start"), False, str(attrs.get("small_start"))),
        (at_first and share is not None, False, f"{of_guessing}, and {gains}"),
        (near and step > 0, False, f"it has trained for {step:.0f} steps, and {gains}"),
    )
    known_as = ((trained, words) for is_so, trained, words in facts if is_so)
    trained, words = next(known_as, (None, gains if near else "how long it has trained is not known"))
    # Not by its loss, which is below that of guessing as soon as it knows how often each class comes.
    far = number_or_none(attrs.get("drawn_moved")) or 0.0 if moved is None else moved
    sure = far > TOUCHED and not 0 < step < FIRST_STEPS and _is_sure_of_wrong_answers(attrs)
    went = (
        step > FIRST_STEPS
        and "update_ratio" in analysis
        and step * float(analysis["update_ratio"].median()) > WAY
    )
    knows = (share_of_constant(attrs) or 1.0) < KNOWS
    begun = far > BEGUN or step >= MANY_STEPS or distance > MOVED or sure or went or knows
    return Age(trained, words, begun, far > YOUNG or went)


def _is_sure_of_wrong_answers(attrs: Mapping[str, Any]) -> bool:
    task = task_of(attrs)
    loss, expected, error = (number_or_none(task.get(name)) for name in ("loss", "expected", "uncertainty"))
    if loss is None or expected is None or error is None or "classes" not in task:
        return False
    return loss - 2.0 * error > SURE * expected


# What one step of training ends: streams with 1 − cosine below this are the same numbers but for the rounding of float64, and
# so are states with an angle, as a share of π, below the other.
SAME_STREAMS, SAME_STATES = 1e-12, 1e-7
ONE_STREAM = "all streams are equal to the last digit, although the connections read them unequally"
NOTHING_ADDED = "no block changes any number of the states"


def streams_are_one(cosine: xr.DataArray | None, shares: xr.DataArray | None) -> bool:
    """Whether the streams are still the same numbers although read unequally, so that a step of training would part them."""
    if cosine is None or shares is None:
        return False
    shares = shares.sel(stream=[s for s in shares["stream"].values.tolist() if s != "mean"])
    # A tenth of an equal share: larger than rounding, smaller than any random start of H_pre. Heuristic.
    unequal = shares.max("stream") - shares.min("stream") > 0.1 / shares.sizes["stream"]
    return bool((1.0 - cosine).max() < SAME_STREAMS and unequal.any())


def _nothing_is_added(analysis: xr.Dataset) -> bool:
    """Whether every block gives exactly nothing, as branches that begin at zero do."""
    table = analysis.get("angular_distance")
    if table is None:
        return False
    angles = table.sel(tokens="ordinary", drop=True) if "tokens" in table.dims else table
    return angles.sizes["depth"] > 1 and bool((angles.fillna(0.0) < SAME_STATES).all())


def task_of(attrs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is known of the task; a file may have anything in its place."""
    task = attrs.get(TASK)
    return task if isinstance(task, Mapping) else {}


def share_of_guessing(attrs: Mapping[str, Any]) -> float | None:
    """The loss over that of guessing among all classes; None where either is not known."""
    return _share(attrs, "guessing")


def share_of_constant(attrs: Mapping[str, Any]) -> float | None:
    """The loss over that of an answer that never changes; None where either is not known."""
    return _share(attrs, "constant")


def knows_frequencies_alone(task: Mapping[str, Any], loss: float | None) -> bool:
    """Whether a network with this loss knows how often each class comes, and nothing of its input."""
    guessing, constant = (number_or_none(task.get(name)) for name in ("guessing", "constant"))
    if loss is None or constant is None or loss < NOTHING_LEARNED * constant:
        return False
    return guessing is None or loss < KNOWS * guessing


def _share(attrs: Mapping[str, Any], of: str) -> float | None:
    loss, other = (number_or_none(task_of(attrs).get(name)) for name in ("loss", of))
    return loss / other if loss is not None and other else None


def number_or_none(value: Any) -> float | None:
    """The number that an attribute is; None where it is none, for a file may have anything in its place."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if found == found else None
