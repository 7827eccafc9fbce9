"""Which colour has a run? The same on the screen, in the report and on paper: that of its place in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import xarray as xr

from depthscope.app.figures.palette import RUN_COLOUR, RUN_COLOURS
from depthscope.app.readings.readings import Reading
from depthscope.diagnostics import schema

__all__ = ["analyses_of", "colour_places"]


def analyses_of(
    readings: Sequence[Reading], places: Mapping[str, int] | None = None
) -> dict[str, xr.Dataset]:
    """The analyses of runs, each with its colour.

    Parameters
    ----------
    readings : sequence of Reading
        Runs, in the order in which they are drawn.
    places : mapping of str to int, optional
        Of `colour_places`, where some were given out before.

    Returns
    -------
    dict of str to Dataset
        By the names of the readings.
    """
    places = colour_places(readings) if places is None else places
    return {
        reading.name: reading.analysis.assign_attrs({RUN_COLOUR: places[reading.name]})
        for reading in readings
    }


def colour_places(readings: Sequence[Reading], kept: Mapping[str, int] | None = None) -> dict[str, int]:
    """The number of each run's colour: no two are the same among as many runs as there are colours.

    Parameters
    ----------
    readings : sequence of Reading
        Runs.
    kept : mapping of str to int, optional
        Colours that some of them have already.

    Returns
    -------
    dict of str to int
        By the names of the readings: the place of the run among the runs of its folder, or where another run has that colour,
        the next one that is free.
    """
    kept = kept or {}
    wanted = {
        reading.name: kept.get(reading.name, _place(reading, number)) % len(RUN_COLOURS)
        for number, reading in enumerate(readings)
    }
    found: dict[str, int] = {}
    for name in sorted(
        wanted, key=lambda name: name not in kept
    ):  # those that have one first, else in the given order
        place = wanted[name]
        while len(found) < len(RUN_COLOURS) and place in found.values():
            place = (place + 1) % len(RUN_COLOURS)
        found[name] = place
    return {reading.name: found[reading.name] for reading in readings}


def _place(reading: Reading, number: int) -> int:
    """Among the runs of the folder, by their names; of a run in memory, among those that are drawn."""
    if not reading.path:
        return number
    path = Path(reading.path)
    try:
        beside = sorted(
            entry.name
            for entry in path.parent.iterdir()
            if not entry.name.startswith(".")
            and (entry.name.endswith(schema.SUFFIXES) or schema.is_live_store(entry))
        )
    except OSError:
        return number
    return beside.index(path.name) if path.name in beside else number
