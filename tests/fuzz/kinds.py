"""What is mutated, and what is it given to? A kind has its material, its mutators and its doors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.outcomes import Answer

Subject = dict[str, Any]
"""What the doors are given, such as {"path": …} or {"words": […]}; JSON, so that a case can be kept as a file."""

Mutator = Callable[[Random, Path, Path], Subject]
"""(random numbers of the case, folder of the unmutated material, empty folder of the case) → subject."""


class NotApplicable(Exception):
    """The mutator has nothing to mutate in the material that its random numbers chose."""


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Parameters
    ----------
    name : str
        Plural: ``runs``.
    mutators : mapping of str to callable
        By the name that is printed.
    prepare : callable
        Writes the unmutated material into a folder; called once, in a process of its own.
    warm_up : callable
        Given the material, imports what the doors import, once, without starting a thread.
    doors : callable
        (subject, folder of the material, random numbers) → answers; called in the process of the case.
    command : callable
        Subject → the one command that shows it again.
    mib : float
        Memory that a case may take above the warmed-up process.
    """

    name: str
    mutators: Mapping[str, Mutator]
    prepare: Callable[[Path], None]
    warm_up: Callable[[Path], None]
    doors: Callable[[Subject, Path, Random], list[Answer]]
    command: Callable[[Subject], str]
    mib: float = 256
