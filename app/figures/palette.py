"""Which colours do runs have, on the screen and on paper? One palette, and the number that each run carries."""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr

RUN_COLOURS = (
    *("#0A6FC2", "#8B9B0B", "#BC494C", "#DD6BAB", "#33730A"),
    *("#01A0C5", "#6E6193", "#3DA36B", "#317E67", "#5D8AF1"),
)
"""Ten colours of lines, dark and light in turn, so that neighbours differ in grey too. Each has a contrast of 3 : 1 against
white and against the dark page; any two differ to eyes without red or green cones. Found by a search over OKLab."""

RUN_COLOUR = "run_colour"
"""Attribute of an analysis that is drawn: the number of its run's colour, see `app.figures.run_colours`."""


def colour_numbers(analyses: Mapping[str, xr.Dataset]) -> dict[str, int]:
    """The number of the colour of each run that is shown: its own, else its place.

    Parameters
    ----------
    analyses : mapping of str to Dataset
        Everything that is shown together, by name.

    Returns
    -------
    dict of str to int
    """
    return {name: int(of.attrs.get(RUN_COLOUR, place)) for place, (name, of) in enumerate(analyses.items())}
