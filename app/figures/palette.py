"""How are runs distinguished, on the screen and on paper? By colour, by the shape of marks, by dashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

import xarray as xr

RUN_COLOURS = (
    *("#3F90DA", "#FFA90E", "#BD1F01", "#94A4A2", "#832DB6"),
    *("#A96B59", "#E76300", "#B9AC70", "#717581", "#92DADD"),
)
"""The ten colours of Petroff, "Accessible Color Sequences for Data Visualization" (arXiv:2107.02270), in their order, which is
``petroff10`` of matplotlib: distinguishable for people without one kind of cone, and neighbours differ in grey."""

MARK_EDGE = "#808080"
"""Around every mark: on white and on the dark page it has a contrast of more than 3 : 1, which pale colours lack on one."""

SHAPES = (
    *("circle", "square", "triangle-up", "diamond", "triangle-down"),
    *("cross", "x", "triangle-left", "pentagon", "triangle-right"),
)
"""Shapes of marks: what is left of a colour in print without any."""


@dataclass(frozen=True)
class Look:
    """How a measured line is drawn.

    ``colour, shape``: of the line, and of its marks.
    ``hollow``: whether its marks are.
    ``variant``: which of the lines of its run, for the dashes.
    """

    colour: str
    shape: str
    hollow: bool
    variant: int


def look_of(number: int, variant: int = 0) -> Look:
    """How a measured line is drawn; `variant` is which of the lines of its run."""
    # From the eleventh run on colours recur, with other marks.
    place = number + number // len(RUN_COLOURS)
    return Look(
        RUN_COLOURS[number % len(RUN_COLOURS)],
        # Steps of three: neighbouring variants of a run do not get the mark of the next run.
        SHAPES[(place + 3 * variant) % len(SHAPES)],
        hollow=(place + variant) % 2 == 1,
        variant=variant,
    )


def colour_numbers(analyses: Mapping[str, xr.Dataset]) -> dict[str, int]:
    """The number of the colour of each run: from its name, so that it is the same on every page, in a report and on paper.

    ``analyses``: everything that is shown together, by name, in any order.
    Returns: Of runs whose names give the same colour the first
    by the alphabet has it, and each other one the next that is free; from the eleventh run on colours recur.
    """
    wanted = {name: _number_from(name) for name in sorted(analyses)}
    numbers: dict[str, int] = {}
    taken: set[int] = set()
    # First every colour that a name gives, then those that clash: a clash moves no third run.
    clashing = []
    for name, number in wanted.items():
        if number in taken:
            clashing.append(name)
        else:
            taken.add(number)
            numbers[name] = number
    for name in clashing:
        numbers[name] = next(number for number in _from(wanted[name]) if number not in taken)
        taken.add(numbers[name])
    return {name: numbers[name] for name in analyses}


def _number_from(name: str) -> int:
    """A number of the palette that depends on the name alone: Python's own hash differs in every process."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") % len(RUN_COLOURS)


def _from(number: int) -> Iterator[int]:
    """All numbers, round after round of the palette, each beginning with one colour."""
    size = len(RUN_COLOURS)
    return (size * (place // size) + (number + place) % size for place in count())
