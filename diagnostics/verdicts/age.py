"""How old is a network? Facts of its training alone: what it has learned, for how long, how far its weights have moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import xarray as xr

TASK = "task"
"""Attribute of a run: what its loss is of: the ``classes``, the loss of ``guessing`` among them, and the ``loss`` itself."""

REPAIR = "repair"
"""Attribute of a run: the use of the same weights that lowers the loss most; see `depthscope.probes.repairs`."""

# Share of the loss of a constant answer, from which on nothing is learned of the input, or nothing of it left.
NOTHING_LEARNED = 0.97
# The same share of a network that has surely learned something of the input.
KNOWS = 0.9
# What predictions claim to know is no less than a fifth of all that there is to know.
LEAST_CLAIM = 0.2
ONE_SIDED = 1.645  # standard errors of a one-sided 95 % interval
# Steps of a recording in which a network may still be as it was drawn, and after which it is not. Heuristics.
FIRST_STEPS, MANY_STEPS = 50, 300
# ‖W − W₀‖ / ‖W₀‖ of the weight that moved most.
MOVED = 0.1


class Age(NamedTuple):
    """Whether a network is trained, in words too; None where no fact tells."""

    trained: bool | None
    words: str


def age_of(analysis: xr.Dataset) -> Age:
    """What the facts say, the surest first."""
    share, repaired = share_of_constant(analysis.attrs), _repaired_share(analysis.attrs)
    step = (number_or_none(analysis["step"].values) if "step" in analysis.coords else None) or 0.0
    # No `get`: for a name that it lacks xarray looks for similar ones, which took half of the time of all verdicts.
    name = "first_weight_distance"
    distance = float(analysis[name].max()) if name in analysis else 0.0
    facts = (
        (
            share is not None and share < KNOWS,
            True,
            f"its loss is {100 * (share or 0):.0f} % of a constant answer's",
        ),
        (
            repaired < KNOWS,
            True,
            f"after a repair its loss is {100 * repaired:.0f} % of a constant answer's",
        ),
        (step >= MANY_STEPS, True, f"it has trained for {step:.0f} steps"),
        (distance > MOVED, True, f"its weights have moved by up to {100 * distance:.0f} %"),
        (analysis.attrs.get("untouched"), False, "its weights are as they were drawn"),
        (0 < step <= FIRST_STEPS, False, f"it has trained for {step:.0f} steps"),
        (
            _has_learned_and_forgot(analysis.attrs),
            True,
            "its predictions claim to know much and are better than guessing",
        ),
    )
    known = (Age(trained, words) for is_so, trained, words in facts if is_so)
    return next(known, Age(None, "whether it is trained is not known"))


def _has_learned_and_forgot(attrs: Mapping[str, Any]) -> bool:
    """Whether predictions claim to know much, and lose less than guessing all the same.

    Those of a network that was just drawn lose about as much more than guessing as they claim to know.
    """
    names = ("loss", "uncertainty", "guessing", "constant", "expected")
    known = [number_or_none(task_of(attrs).get(name)) for name in names]
    if None in known:
        return False
    loss, error, guessing, constant, expected = (float(value or 0.0) for value in known)
    return constant - expected > LEAST_CLAIM * constant and loss + ONE_SIDED * error < guessing


def _repaired_share(attrs: Mapping[str, Any]) -> float:
    """The loss that the best repair surely leaves, over that of a constant answer; 1 where none was found."""
    result = attrs.get(REPAIR)
    found = result if isinstance(result, Mapping) else {}
    loss, half_width = (
        number_or_none(found.get("repaired")),
        number_or_none(found.get("repaired_half_width")) or 0.0,
    )
    constant = number_or_none(task_of(attrs).get("constant"))
    return (loss + half_width) / constant if loss is not None and constant else 1.0


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
