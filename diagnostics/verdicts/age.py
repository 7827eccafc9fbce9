"""How old is a network, what does it know, and what came in? Facts of its training, its loss and its data."""

from __future__ import annotations

import math
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
# What a network has to lose is no less than this share of the loss of a constant answer: of one that has learned hardly
# anything a small change of the loss would be much of it.
LEAST_REACH = 0.2
# A network that does not claim this share of what it knows, beyond the noise of the sample, is in the middle of its training,
# where scales still grow, or has lost its scales: the loss alone does not tell which.
UNSURE = 0.3
ONE_SIDED = 1.645  # standard errors of a one-sided 95 % interval
# Steps of a recording in which a network may still be as it was drawn, and after which it is not. Heuristics.
FIRST_STEPS, MANY_STEPS = 50, 300
FEWEST = 3  # different tokens of a sequence, of which a rank can fall
FEW_TOKENS = 8  # different tokens, of fewer of which what is alike may be chance
# ‖W − W₀‖ / ‖W₀‖ of the weight that moved most.
MOVED = 0.1


class Task(NamedTuple):
    """The loss of a run, and those that it is compared with, in its units; None for what is not known."""

    loss: float | None
    uncertainty: float | None  # standard error of the loss
    guessing: float | None  # among all classes
    constant: float | None  # of an answer that never changes
    expected: float | None  # by the predictions themselves
    expected_error: float | None  # standard error of loss − expected
    targets_per_sequence: float | None

    @classmethod
    def of(cls, attrs: Mapping[str, Any]) -> Task:
        """What the attributes of a run tell."""
        return cls(*numbers_in(attrs, TASK, cls._fields))

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

    @property
    def to_lose(self) -> float | None:
        """What the loss is below that of a constant answer, in nats; None where either is not known."""
        if self.loss is None or not self.most:
            return None
        return max(self.most - self.loss, LEAST_REACH * self.most)

    @property
    def claims_much(self) -> bool | None:
        """Whether predictions claim to know a good part of what there is to know; None where that is not known."""
        if self.expected is None or self.constant is None:
            return None
        return self.constant - self.expected > LEAST_CLAIM * self.constant

    @property
    def may_be_new(self) -> bool:
        """Whether it knows nothing and hardly claims to, as one that was just drawn; one that lost all still claims it."""
        return self.claims_much is False and (self.share_of_constant or 0.0) > NOTHING_LEARNED

    @property
    def has_learned_and_forgot(self) -> bool:
        """Whether predictions claim to know much, and lose less than guessing all the same.

        Those of a network that was just drawn lose about as much more than guessing as they claim to know.
        """
        if not self.claims_much or self.loss is None or self.guessing is None or self.uncertainty is None:
            return False
        return self.loss + ONE_SIDED * self.uncertainty < self.guessing

    @property
    def is_unsure(self) -> bool:
        """Whether predictions do not claim what the network knows."""
        if self.constant is None or self.loss is None or self.expected is None:
            return False
        return self._beyond_expected < -UNSURE * (self.constant - self.loss)

    @property
    def wrong_part(self) -> float:
        """What part of what the predictions claim to know is wrong, beyond the noise of the sample; 0 where not known."""
        if self.expected is None or not self.constant:
            return 0.0
        return self._beyond_expected / max(self.constant - self.expected, LEAST_CLAIM * self.constant)

    @property
    def _beyond_expected(self) -> float:
        """What is lost above what the predictions expect, or (negative) below, beyond the noise of the sample."""
        if self.loss is None or self.expected is None or self.expected_error is None:
            return 0.0
        apart = self.loss - self.expected
        return math.copysign(max(abs(apart) - ONE_SIDED * self.expected_error, 0.0), apart)


class Inputs(NamedTuple):
    """How many different tokens came in; None where the input has no numbers that name tokens."""

    per_sequence: float | None  # on average
    in_all: float | None

    @classmethod
    def of(cls, attrs: Mapping[str, Any]) -> Inputs:
        """What the attributes of a run tell."""
        return cls(*numbers_in(attrs, "distinct_tokens", cls._fields))

    @property
    def are_few(self) -> bool:
        """Whether what is alike may be chance, or the sequences are so short that all tokens are where sinks are."""
        each, of_all = self
        return (each is not None and each < FEWEST) or (of_all is not None and of_all < FEW_TOKENS)


class Repair(NamedTuple):
    """The loss as it is and after the best repair, with their 95 % intervals over sequences."""

    loss: float | None
    repaired: float | None
    half_width: float  # of what it regains
    repaired_half_width: float  # of what is left

    @classmethod
    def of(cls, attrs: Mapping[str, Any]) -> Repair:
        """What the attributes of a run tell."""
        loss, repaired, *half_widths = numbers_in(attrs, REPAIR, cls._fields)
        return cls(loss, repaired, *(each or 0.0 for each in half_widths))

    @property
    def surely_left(self) -> float:
        """The loss that the best repair surely leaves; infinite where none was found."""
        return math.inf if self.repaired is None else self.repaired + self.repaired_half_width


class Age(NamedTuple):
    """Whether a network is trained, in words too; None where no fact tells.

    ``is_old``: whether steps or the way of the weights show that it is past the start of its training.
    """

    trained: bool | None
    words: str
    is_old: bool = False


def age_of(analysis: xr.Dataset) -> Age:
    """What the facts say, the surest first."""
    task, after_repair = Task.of(analysis.attrs), Repair.of(analysis.attrs).surely_left
    step = (number_or_none(analysis["step"].values) if "step" in analysis.coords else None) or 0.0
    # No `get`: for a name that it lacks xarray looks for similar ones, which took half of the time of all verdicts.
    name = "first_weight_distance"
    distance = float(analysis[name].max()) if name in analysis else 0.0
    share = 1.0 if task.share_of_constant is None else task.share_of_constant
    repaired = after_repair / task.constant if task.constant else 1.0
    has_trained = f"it has trained for {step:.0f} steps"
    knew = "its predictions claim to know much and are better than guessing"
    facts = (
        (share < KNOWS, True, f"its loss is {100 * share:.0f} % of a constant answer's"),
        (repaired < KNOWS, True, f"after a repair its loss is {100 * repaired:.0f} % of a constant answer's"),
        (step >= MANY_STEPS, True, has_trained),
        (distance > MOVED, True, f"its weights have moved by up to {100 * distance:.0f} %"),
        (analysis.attrs.get("untouched"), False, "its weights are as they were drawn"),
        (0 < step <= FIRST_STEPS, False, has_trained),
        (task.has_learned_and_forgot, True, knew),
        (True, None, "whether it is trained is not known"),
    )
    trained, words = next((trained, words) for is_so, trained, words in facts if is_so)
    return Age(trained, words, step >= MANY_STEPS or distance > MOVED)


def mapping_in(attrs: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An attribute that is a mapping; a file may have anything in its place."""
    found = attrs.get(name)
    return found if isinstance(found, Mapping) else {}


def numbers_in(attrs: Mapping[str, Any], name: str, keys: tuple[str, ...]) -> list[float | None]:
    """Some numbers of such an attribute."""
    return [number_or_none(mapping_in(attrs, name).get(key)) for key in keys]


def number_or_none(value: Any) -> float | None:
    """The number that an attribute is; None where it is none, for a file may have anything in its place."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if found == found else None
