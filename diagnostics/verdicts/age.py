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
    task, repaired = Task.of(analysis.attrs), _repaired_share(analysis.attrs)
    step = (number_or_none(analysis["step"].values) if "step" in analysis.coords else None) or 0.0
    # No `get`: for a name that it lacks xarray looks for similar ones, which took half of the time of all verdicts.
    name = "first_weight_distance"
    distance = float(analysis[name].max()) if name in analysis else 0.0
    share = 1.0 if task.share_of_constant is None else task.share_of_constant
    has_trained = f"it has trained for {step:.0f} steps"
    knew = "its predictions claim to know much and are better than guessing"
    facts = (
        (share < KNOWS, True, f"its loss is {100 * share:.0f} % of a constant answer's"),
        (repaired < KNOWS, True, f"after a repair its loss is {100 * repaired:.0f} % of a constant answer's"),
        (step >= MANY_STEPS, True, has_trained),
        (distance > MOVED, True, f"its weights have moved by up to {100 * distance:.0f} %"),
        (analysis.attrs.get("untouched"), False, "its weights are as they were drawn"),
        (0 < step <= FIRST_STEPS, False, has_trained),
        (_has_learned_and_forgot(task), True, knew),
    )
    known = (Age(trained, words) for is_so, trained, words in facts if is_so)
    return next(known, Age(None, "whether it is trained is not known"))


class Task(NamedTuple):
    """The loss of a run, and those that it is compared with, in its units; None for what is not known."""

    loss: float | None
    uncertainty: float | None  # standard error of the loss
    guessing: float | None  # among all classes
    constant: float | None  # of an answer that never changes
    expected: float | None  # by the predictions themselves
    expected_error: float | None  # standard error of loss − expected

    @classmethod
    def of(cls, attrs: Mapping[str, Any]) -> Task:
        """What the attributes of a run tell."""
        return cls(*(number_or_none(task_of(attrs).get(name)) for name in cls._fields))

    @property
    def share_of_guessing(self) -> float | None:
        """The loss over that of guessing among all classes."""
        return self.loss / self.guessing if self.loss is not None and self.guessing else None

    @property
    def share_of_constant(self) -> float | None:
        """The loss over that of an answer that never changes."""
        return self.loss / self.constant if self.loss is not None and self.constant else None

    @property
    def most(self) -> float | None:
        """The loss of a constant answer, or of guessing where that is not known."""
        return self.guessing if self.constant is None else self.constant


def _has_learned_and_forgot(task: Task) -> bool:
    """Whether predictions claim to know much, and lose less than guessing all the same.

    Those of a network that was just drawn lose about as much more than guessing as they claim to know.
    """
    if task.loss is None or task.guessing is None or task.constant is None or task.expected is None:
        return False
    if task.uncertainty is None:
        return False
    claims = task.constant - task.expected > LEAST_CLAIM * task.constant
    return claims and task.loss + ONE_SIDED * task.uncertainty < task.guessing


def _repaired_share(attrs: Mapping[str, Any]) -> float:
    """The loss that the best repair surely leaves, over that of a constant answer; 1 where none was found."""
    result, constant = attrs.get(REPAIR), Task.of(attrs).constant
    found = result if isinstance(result, Mapping) else {}
    loss, half_width = (number_or_none(found.get(name)) for name in ("repaired", "repaired_half_width"))
    return (loss + (half_width or 0.0)) / constant if loss is not None and constant else 1.0


def task_of(attrs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is known of the task; a file may have anything in its place."""
    task = attrs.get(TASK)
    return task if isinstance(task, Mapping) else {}


def number_or_none(value: Any) -> float | None:
    """The number that an attribute is; None where it is none, for a file may have anything in its place."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if found == found else None
