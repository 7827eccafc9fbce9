"""Which models are tried? Every type of transformers, a member of every family of timm and torchvision, and the designs."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from tests.models.matrix.expectations import Expected

SEQUENCES, TOKENS = 3, 22
"""Sizes of a batch: unlike each other and unlike every width, so that no axis can be taken for another one."""

Make = Callable[[int, int], Mapping[str, Any]]


@dataclass(frozen=True)
class Subject:
    """One model and the batches that it takes.

    Parameters
    ----------
    note : str
        What is special about the batch; empty for the first one.
    model : Module
    make : callable
        ``make(sequences, tokens)`` gives a batch.
    recipe : str
        The batch in words.
    """

    note: str
    model: nn.Module
    make: Make
    recipe: str


@dataclass(frozen=True)
class Case:
    """One model that is tried.

    Parameters
    ----------
    package, name : str
        Where its code is from, and what it is called there.
    subjects : callable
        ``subjects(seed)`` builds it; raises `NotBuildable`.
    expected : Expected
        What is known of its connections.
    judged : callable, optional
        ``judged(seed)`` gives (outcome, reason) where a model has a judge of its own.
    """

    package: str
    name: str
    subjects: Callable[[int], list[Subject]] | None
    expected: Expected
    judged: Callable[[int], tuple[str, str]] | None = None

    @property
    def in_tenth(self) -> bool:
        """Whether it is in the fixed tenth that every CI run tries."""
        return zlib.crc32(f"{self.package}/{self.name}".encode()) % 10 == 0


class NotBuildable(Exception):
    """A model cannot be built tiny, or no batch fits it."""


def cases() -> list[Case]:
    """All of them."""
    from tests.models.matrix.image_models import image_cases
    from tests.models.matrix.transformers_models import transformers_cases

    return [*transformers_cases(), *image_cases(), *design_cases()]


def design_cases() -> list[Case]:
    """The public designs that are re-written here, each with a ground truth of its own, where they exist."""
    if importlib.util.find_spec("tests.models.designs") is None:
        return []
    from tests.models.designs.catalogue import DESIGNS

    return [Case("design", design.name, None, Expected(), partial(_judged, design)) for design in DESIGNS]


def _judged(design: Any, seed: int) -> tuple[str, str]:
    from tests.models.designs.outcome import advised, outcome

    found = outcome(design)
    if found.word == "states":  # factors of plain connections are stored where they are asked for
        again = outcome(design, **advised(found))
        if again.word == "right":
            return "right", "factors of the branches: with sites=[…, 'branch_out']"
    # Its own words: states and matrices that are all right, or of which some are missing or named as something else.
    words = {"states": "unproven", "unproven, states off": "unproven", "misnamed": "wrong"}
    if found.word == "part" and not found.why.startswith("not covered: "):
        words["part"] = "wrong"  # a tower is missing, and the run does not say so
    return words.get(found.word, found.word), str(found) if found.word in words else found.why
