"""Which runs differ, and where? Tests of the metrics that are compared, and a sentence for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from depthscope.app.figures.build.values import names_of, pick, positions
from depthscope.app.figures.composed.panels import groups_of
from depthscope.app.figures.specification import Heatmap, Line, Lines, Selection
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.tables import spoken
from depthscope.app.text.numbers import consecutive, number, quantity
from depthscope.diagnostics import CATALOGUE, schema
from depthscope.diagnostics.analysis.differences import (
    Difference,
    by_sequence,
    of_seeds,
    of_two,
    same_sequences,
)
from depthscope.diagnostics.errors import AbsentError, InputError

ALONG = ("depth", "connection")

ONE_RUN_EACH = "This compares checkpoints. To compare designs, give several seeds of each"


def between_runs(
    readings: Sequence[Reading], metrics: Sequence[str], view: Selection, *, max_bytes: int | None = None
) -> list[Difference]:
    """Every run against the first, sequence by sequence where they have seen the same ones."""
    found = []
    with ExitStack() as stack:
        traces = {}
        for reading in readings:
            with suppress(AbsentError):  # a run of statistics or metrics alone
                # The run was verified when it was read; the metadata of its other groups take seconds to read.
                opened = schema.open_group(reading.path, "trace", reading.chain, max_bytes=max_bytes)
                traces[reading.name] = stack.enter_context(opened)
        # Each run is measured once, whatever it is compared with.
        profiles = {
            (run, metric): _profiles(trace, metric, view)
            for run, trace in traces.items()
            for metric in metrics
        }
        # A chain with the same chain of the other run: an encoder is no decoder.
        able = [reading for reading in readings if reading.name in traces]
        for first, other in [
            (first, each)
            for first in able
            if first.run == readings[0].run
            for each in able
            if each.chain == first.chain and each.run != first.run
        ]:
            digests = first.attrs.get("data_digest"), other.attrs.get("data_digest")
            paired = same_sequences(traces[first.name], traces[other.name], digests)
            for metric in metrics:
                values = {each.name: profiles[each.name, metric] for each in (first, other)}
                known = {name: value for name, value in values.items() if value is not None}
                aligned = at_shared_depths(known)
                if len(aligned) == 2:
                    difference = of_two(metric, aligned, paired=paired)
                    if len({value.size // value.sizes["sequence"] for value in known.values()}) > 1:
                        difference = replace(difference, how=f"at the same relative depth, {difference.how}")
                    found.append(difference)
    return found


def _profiles(trace: xr.Dataset, metric: str, view: Selection) -> xr.DataArray | None:
    """A metric along depth or connections for each sequence."""
    values = by_sequence(trace, CATALOGUE[metric], scope=view.scope)
    if values is None:
        return None
    value = pick(values.to_dataset(name=metric), metric, view)
    others = set() if value is None else set(value.dims) - {"sequence"}
    # A matrix of every two depths has too many cells for one sentence.
    return value if len(others) == 1 and others <= set(ALONG) else None


def at_shared_depths(values: Mapping[str, xr.DataArray]) -> dict[str, xr.DataArray]:
    """Two runs at the same relative depth: at every depth of the shallower one, and the nearest of the other."""
    axes = {next(str(dim) for dim in value.dims if dim in ALONG) for value in values.values()}
    if len(values) < 2 or len(axes) != 1:
        return {}
    (axis,) = axes
    where = {name: positions(value, axis, "relative") for name, value in values.items()}
    shallow = min(where, key=lambda name: len(where[name]))
    labels = values[shallow][axis].values
    # No interpolation: between two measured depths there is no state.
    nearest = {name: np.abs(at[None] - where[shallow][:, None]).argmin(axis=1) for name, at in where.items()}
    return {
        name: value.isel({axis: nearest[name]}).reset_coords(drop=True).assign_coords({axis: labels})
        for name, value in values.items()
    }


def between_groups(
    readings: Sequence[Reading], metrics: Sequence[str], view: Selection, *, by: str
) -> list[Difference]:
    """Groups of runs against the first group, such as several seeds of two designs.

    ``by``: the attribute that all runs of a group share, such as ``"family"``.
    Raises InputError: Where a run lacks the attribute, or all runs have the same.
    """
    groups: dict[str, list[Reading]] = {}
    group_of = groups_of(readings, by)
    for reading in readings:
        groups.setdefault(group_of[reading.name], []).append(reading)
    if len(groups) < 2:
        raise InputError(f"all runs have {by} {next(iter(groups), '')!r}; name an attribute that differs")
    first, *others = groups
    found = []
    for other in others:
        for metric in metrics:
            pair = {name: profiles_of(groups[name], metric, view) for name in (first, other)}
            # Depths of groups that are not equally deep are no repetitions of each other.
            if all(pair.values()) and len({each.shape for of_one in pair.values() for each in of_one}) == 1:
                found.append(of_seeds(metric, pair))
    return found


def profiles_of(readings: Sequence[Reading], metric: str, view: Selection) -> list[xr.DataArray]:
    """The metric of every run of a group; empty where one of them lacks it."""
    found = []
    for reading in readings:
        value = pick(reading.analysis, metric, view)
        # A matrix is no profile, and one of NaN alone has nothing to compare.
        if value is None or value.ndim != 1 or not value.notnull().any():
            return []
        found.append(value)
    return found


def in_words(difference: Difference) -> str:
    """The result of a test in one sentence."""
    name = spoken(difference.metric)
    axis = str(difference.value.dims[0])
    known = np.flatnonzero(~np.isnan(difference.p.values))
    if reason := difference.undecided or ("" if len(known) else "no error is known"):
        return f"{name}: not decided between {difference.first} and {difference.second}: {reason}"
    differs, size = difference.differs, np.abs(difference.value.values)
    # Of those that differ the largest; where none does, the one that chance explains worst.
    clearest = known[np.argmin(difference.p.values[known])]
    at = int(np.argmax(np.where(differs, size, -1)) if differs.any() else clearest)
    value, reach = float(difference.value.values[at]), float(difference.half_width.values[at])
    labels = difference.value[axis].values  # positions, where they have no names
    place = f"{axis} {labels[at]}"
    p = float(difference.p.values[at])
    chance = "< 0.0001" if p < 1e-4 else f"= {number(p, digits=2)}"
    tested = f"{difference.how}; p {chance}, corrected for {len(known)} {axis}s"
    if not differs.any():
        return (
            f"{name}: no difference between {difference.first} and {difference.second} is found; the clearest is "
            f"{quantity(value, reach)} at {place} ({tested}){_equivalence(difference, axis)}"
        )
    side = "above" if value > 0 else "below"
    ranges = [
        f"{labels[run[0]]}" if len(run) == 1 else f"{labels[run[0]]}–{labels[run[-1]]}"
        for run in consecutive(np.flatnonzero(differs))
    ]
    return (
        f"{name}: {difference.second} is {side} {difference.first} by {quantity(abs(value), reach)} at {place} "
        f"({tested}); they differ at {axis} {', '.join(ranges)}"
    )


def _equivalence(difference: Difference, axis: str) -> str:
    """Within which bound the runs are the same, by two one-sided tests at every position (Schuirmann 1987).

    All positions are in their intervals together: no correction for their number is needed to say that none is outside.
    """
    bounds = np.abs(difference.value.values) + difference.half_width.values
    if not np.isfinite(bounds).any():
        return ""
    largest = float(np.nanmax(bounds))
    return f"; a difference is no larger than {number(largest)} at any {axis} (95 % for each)"


def as_dict(difference: Difference) -> dict[str, Any]:
    """Plain values for JSON."""
    axis = str(difference.value.dims[0])
    return {
        **{name: getattr(difference, name) for name in ("metric", "first", "second", "how", "undecided")},
        axis: difference.value[axis].values,
        "difference": difference.value.values,
        "half_width": difference.half_width.values,
        "p": difference.p.values,
        "differs": difference.differs,
        "in_words": in_words(difference),
    }


def difference_figure(found: Sequence[Difference], title: str, colours: Mapping[str, int]) -> Lines:
    """The differences of one metric with their intervals, for the screen.

    ``colours``: run, or group of runs, to the number of its colour: a difference has that of the second.
    Returns: Along the positions of the shallower run of each pair, at its relative depth.
    """
    lines = []
    for each in found:
        value = np.asarray(each.value.values, dtype=np.float64)
        reach = np.asarray(each.half_width.values, dtype=np.float64)
        x = positions(each.value, str(each.value.dims[0]), "relative")
        label = f"{each.second} − {each.first}"
        lines.append(Line(x, value, label, lower=value - reach, upper=value + reach, group=each.second))
    lines.append(Line(np.array([0.0, 1.0]), np.zeros(2), "no difference", role="threshold"))
    words = " ".join(f"{in_words(each)}." for each in found)
    return Lines(
        f"difference_{found[0].metric}",
        f"Difference: {title}",
        "relative depth",
        "difference",
        tuple(lines),
        caption="Shaded: the 95 % interval of each number by itself; what is said to differ is corrected for all positions.",
        alt=f"Differences with intervals. {words}",
        metric=found[0].metric,
        runs=colours,
    )


MOST_ROWS = 30
"""Rows that have names at their side on a screen. A heuristic of ours."""


def difference_map(
    groups: Mapping[str, Sequence[Reading]], metrics: Sequence[str], view: Selection, *, axis: str
) -> tuple[Heatmap, list[str]]:
    """The relative difference of two runs, or of the means of two groups of runs: a row for each measure, the largest first.

    ``metrics``: those that a row may show; of other axes, or of one group alone, they are left out.
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
            means = {name: each[0].copy(data=np.mean(each, axis=0)) for name, each in pair.items()}
            a, b = (each.values for each in at_shared_depths(means).values())
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
