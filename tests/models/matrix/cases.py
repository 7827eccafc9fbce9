"""Which models are tried? Every type of transformers, a member of every family of timm and torchvision."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    """

    package: str
    name: str
    subjects: Callable[[int], list[Subject]]
    expected: Expected

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

    return [*transformers_cases(), *image_cases()]
