"""In which measures do two runs differ, and at which depth? One map of differences that have no units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from depthscope.app.figures.build.values import names_of
from depthscope.app.figures.specification import Heatmap, Selection
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.differences import profiles_of, shared_positions
from depthscope.app.tables.tables import spoken
from depthscope.app.text.numbers import number
from depthscope.diagnostics import CATALOGUE
from depthscope.diagnostics.errors import InputError

MOST_ROWS = 30
"""Rows that have names at their side on a screen. A heuristic of ours."""


def difference_map(
    groups: Mapping[str, Sequence[Reading]], metrics: Sequence[str], view: Selection, *, axis: str
) -> tuple[Heatmap, list[str]]:
    """The relative difference of two runs, or of the means of two groups of runs: a row for each measure, the largest first.

    ``groups``: exactly two, by name.
    ``metrics``: those that a row may show; of other axes, or of one group alone, they are left out.
    ``axis``: ``depth`` or ``connection``.
    Returns: second − first over the mean of their sizes, from −2 to 2, at the depths of the shallower run; and the
    metric of each row.
    Raises InputError: Where no measure is known of both.
    """
    (first, _), (second, _) = groups.items()
    rows: dict[str, np.ndarray] = {}
    labelled: dict[str, xr.DataArray] = {}
    for metric in dict.fromkeys(name for name in metrics if CATALOGUE[name].axis == axis):
        pair = {name: profiles_of(readings, metric, view) for name, readings in groups.items()}
        if all(len({one.shape for one in each}) == 1 for each in pair.values()):
            shared = shared_positions({name: each[0] for name, each in pair.items()})
            # Arrays, since their depths are the same now: labels take xarray longer than all of the arithmetic.
            a, b = (
                np.mean([one.values for one in pair[name]], axis=0)[places] for name, places in shared.items()
            )
            size = (np.abs(a) + np.abs(b)) / 2
            # Where both are 0 there is no difference; 0/0 would be undefined.
            rows[metric] = (b - a) / np.where(size > 0, size, 1.0)
            labelled[metric] = min((each[0] for each in pair.values()), key=len)
    if not rows:
        raise InputError(f"{first} and {second} have no measure along their {axis}s in common")
    # Measures of a part of the depths, such as of blocks, have no column in this map.
    columns = max(map(len, rows.values()))
    shown = {name: row for name, row in rows.items() if len(row) == columns and np.isfinite(row).any()}
    ordered = sorted(shown, key=lambda name: -float(np.nanmax(np.abs(shown[name]))))[:MOST_ROWS]
    z = np.stack([shown[name] for name in ordered]).astype(float)
    return _drawn(z, labelled[ordered[0]], ordered, (first, second), axis), ordered


def _drawn(
    z: np.ndarray, sample: xr.DataArray, metrics: Sequence[str], pair: tuple[str, str], axis: str
) -> Heatmap:
    row, column = map(int, np.unravel_index(int(np.nanargmax(np.abs(z))), z.shape))
    reach = float(np.abs(z[row, column])) or 1.0
    words = (
        f"{pair[1]} − {pair[0]}, divided by the mean of their sizes, at the {axis}s of the shallower run. The largest: "
        f"{spoken(metrics[row])} at {axis} {column}, {number(float(z[row, column]))}."
    )
    return Heatmap(
        "difference_map",
        f"Where do they differ most? {pair[1]} − {pair[0]}",
        np.arange(z.shape[1]),
        np.arange(len(metrics)),
        z,
        axis,
        "measure",
        "relative difference",
        limits=(-reach, reach),
        diverging=True,
        caption=words,
        alt=f"Map of measures by {axis}. {words}",
        x_text=names_of(sample, axis),
        y_text=[spoken(name) for name in metrics],
        square=False,
        categorical=("y",),
        from_top=True,
    )
