"""How are runs distinguished, on the screen and on paper? By colour, by the shape of marks, by dashes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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

RUN_COLOUR = "run_colour"
"""Attribute of an analysis that is drawn in another colour than that of its place: its number in the palette."""


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
    """How a measured line is drawn.

    ``variant``: which of the lines of its run.
    """
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
    """The number of the colour of each run that is shown: its place among them, unless it has a number of its own.

    ``analyses``: everything that is shown together, by name.
    """
    return {name: int(of.attrs.get(RUN_COLOUR, place)) for place, (name, of) in enumerate(analyses.items())}
