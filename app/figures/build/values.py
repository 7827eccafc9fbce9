"""Which numbers of an analysis does a selection name, and how sure are they? A labelled slice, its positions, its band."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from depthscope.app.figures.specification import Analyses, Array, Line, Lines, Selection
from depthscope.app.text.visible import LONGEST_NAME, visible
from depthscope.diagnostics.metrics.intervals import DEGREES, LEVEL, factor, margin
from depthscope.diagnostics.verdicts.locations import connection_name, state_name

LABELLED = ("scope", "tokens", "centering", "stream", "estimator", "direction", "reduction")
"""Dimensions of an analysis of which a selection takes one label."""

FLAT = 1e-3
"""A curve whose numbers differ by a smaller part of the largest is better said than drawn. A heuristic of ours."""


def level_of(figure: object) -> float | None:
    """The number that all measured curves of a figure have everywhere; None where they vary, or are undefined somewhere."""
    curves = [line.y for line in figure.lines if line.role == "measured"] if isinstance(figure, Lines) else []
    values = np.concatenate(curves) if curves else np.zeros(0)
    if values.size < 2 or not np.isfinite(values).all():
        return None
    return float(values[0]) if float(np.ptp(values)) <= FLAT * float(np.abs(values).max()) else None


def feeds(data: xr.Dataset, needs: tuple[str, ...]) -> bool:
    """Whether an analysis has a defined number of every variable named."""
    # All NaN is no number: an analysis has a metric that was computed and is undefined everywhere.
    return all(name in data and bool(data[name].notnull().any()) for name in needs)


def pick(data: xr.Dataset, name: str, choice: Selection, **fixed: Any) -> xr.DataArray | None:
    """The slice of one variable that a selection names; None where the run has no such variable or label.

    ``fixed``: labels that win over those of the selection, of any dimension.
    """
    if name not in data:
        return None
    array = data[name]
    # One selection of all dimensions: xarray takes as long for each of several as for one.
    at: dict[str, int] = {}
    if "step" in array.dims:
        # Runs that are compared have measured other steps; the nearest one is shown.
        at["step"] = -1
        if choice.step is not None:
            at["step"] = int(array.indexes["step"].get_indexer([choice.step], method="nearest")[0])
    for dim in dict.fromkeys((*LABELLED, *fixed)):
        if dim not in array.dims:
            continue
        label, labels = fixed[dim] if dim in fixed else getattr(choice, dim), array[dim].values.tolist()
        label = "forward" if dim == "direction" and label == "both" else label  # a slice has one direction
        if label not in labels:
            return None
        at[dim] = labels.index(label)
    return array.isel(at)


def defined_labels(array: xr.DataArray, dim: str) -> list:
    """Labels of a dimension under which a variable has a value.

    Variables of an analysis share their labels: the mean over streams is a label of shares of streams too, but undefined.
    """
    defined = array.notnull().any([other for other in array.dims if other != dim])
    # As Python values: labels are compared with those of a selection, and printed.
    return array[dim].values[defined.values].tolist()


def fed(
    analyses: Analyses, name: str, choice: Selection, **fixed: str
) -> Iterator[tuple[str, xr.Dataset, xr.DataArray]]:
    """Runs that can feed a variable under a selection, with the slice."""
    for run, data in analyses.items():
        array = pick(data, name, choice, **fixed)
        if array is not None and bool(array.notnull().any()):
            yield run, data, array


def positions(array: xr.DataArray, along: str, axis: str = "depth") -> Array:
    """Positions of the values of a slice: indices, or with ``axis="relative"`` fractions of the last index."""
    # The labels of modules are names; of the other axes they are numbers, with gaps where a depth was left out.
    numbered = along in array.coords and along != "weight"
    index = array[along].values if numbered else np.arange(array.sizes[along])
    index = np.asarray(index, dtype=np.float64)
    last = index.max(initial=0.0)
    # One depth alone has no relative position but 0.
    return index / last if axis == "relative" and last > 0 else index


def names_of(array: xr.DataArray, along: str) -> list[str]:
    """What people call each position, as verdicts do: module path, else block and site."""
    # Both axes of a matrix share the names, which are coordinates of the first one.
    base = along.removeprefix("other_")
    if base == "weight":
        return [visible(path, longest=LONGEST_NAME) for path in array["weight"].values]
    prefix, part = ("", "site") if base == "depth" else ("connection_", "branch")
    layer = _labels(array, f"{prefix}layer", base)
    kind = _labels(array, part, base)
    if layer is None or kind is None:
        return [f"{base} {i}" for i in range(array.sizes[along])]
    name = state_name if base == "depth" else connection_name
    return [
        visible(name(str(site), int(n)), longest=LONGEST_NAME) for n, site in zip(layer, kind, strict=True)
    ]


def _labels(array: xr.DataArray, name: str, base: str) -> list | None:
    """Values of a label coordinate along `base`, None where the analysis does not carry it."""
    return list(array[name].values) if name in array.coords and array[name].dims == (base,) else None


def streams_of(analyses: Analyses) -> list[str]:
    """Stream labels of all runs together, "mean" first."""
    found = {str(s) for data in analyses.values() if "stream" in data.coords for s in data["stream"].values}
    # As numbers: "10" comes after "9".
    numbered = sorted((s for s in found if s.isdigit()), key=int)
    return (["mean"] if "mean" in found or not numbered else []) + numbered


class Spread(NamedTuple):
    """What is drawn around a curve, and the sentences of the caption about it."""

    lower: Array | None = None
    upper: Array | None = None
    error: Array | None = None
    words: tuple[str, ...] = ()


def spread_of(data: xr.Dataset, curve: xr.DataArray, choice: Selection, around: str, **fixed: str) -> Spread:
    """The band around a curve: quantiles or percentiles over tokens, or the interval over sequences.

    ``curve``: one-dimensional slice of a variable, under its name.
    ``around``: variable with the band: along ``quantile``, or as ± of the value; empty where there is none.
    """
    name = f"{curve.name}_stderr"
    error = _margin(data, curve, choice, fixed)
    # The band that a figure names is more specific than the percentiles that every reduced metric has.
    band = _declared_band(data, curve, choice, around, fixed) or _percentiles(data, curve, choice, fixed)
    if error is None:
        # Of one sequence there is no error over sequences; the analysis gives the reason.
        reason = data[name].attrs.get("undefined_because") if name in data else None
        return band or Spread(words=(f"No standard error: {reason}.",) if reason else ())
    # A jackknife is named, since its error of a pooled metric is not that of a mean over sequences.
    estimator = str(data[name].attrs.get("estimator", ""))
    what = _interval_words(data[name]) + (f" ({estimator})" if "jackknife" in estimator else "")
    if band is None:
        return Spread(curve.values - error, curve.values + error, None, (f"Shaded: {what}.",))
    return Spread(band.lower, band.upper, error, (*band.words, f"Whiskers: {what}."))


def _interval_words(error: xr.DataArray) -> str:
    if DEGREES not in error.attrs:
        return f"± {margin(error)[1]}"
    return f"{100 * LEVEL:g} % interval over sequences (n = {int(error.attrs[DEGREES]) + 1})"


def _margin(data: xr.Dataset, curve: xr.DataArray, choice: Selection, fixed: dict[str, str]) -> Array | None:
    """How far the band or the whiskers reach to each side."""
    # An analysis has the standard error of the mean over tokens only, not that of a percentile.
    if "reduction" in data[str(curve.name)].dims and choice.reduction != "mean":
        return None
    picked = pick(data, f"{curve.name}_stderr", choice, **fixed)
    error = None if picked is None else aligned(margin(picked)[0], curve)
    return None if error is None or not np.isfinite(error).any() else error


def _declared_band(
    data: xr.Dataset, curve: xr.DataArray, choice: Selection, around: str, fixed: dict[str, str]
) -> Spread | None:
    """The band of the variable that the figure names."""
    found = pick(data, around, choice, **fixed) if around else None
    if found is None or not bool(found.notnull().any()):
        return None
    if "quantile" in found.dims:
        # The outermost quantiles that the analysis has, whichever they are.
        ends = found.transpose("quantile", *curve.dims)
        low, high = (100 * float(q) for q in ends["quantile"].values[[0, -1]])
        return Spread(
            ends.values[0], ends.values[-1], None, (f"Shaded: {low:g} to {high:g} % of the tokens.",)
        )
    # After a colon a long name explains itself, which is too long for a band.
    what = str(data[around].attrs.get("long_name", around)).partition(":")[0]
    words = f"Shaded: ± {what[0].lower()}{what[1:]}."
    return Spread(curve.values - found.values, curve.values + found.values, None, (words,))


def _percentiles(
    data: xr.Dataset, curve: xr.DataArray, choice: Selection, fixed: dict[str, str]
) -> Spread | None:
    """1st to 99th percentile over tokens, around a mean or a median."""
    name = str(curve.name)
    if "reduction" not in data[name].dims or choice.reduction not in ("mean", "median"):
        return None
    low, high = (
        aligned(pick(data, name, choice, **{**fixed, "reduction": end}), curve) for end in ("p1", "p99")
    )
    if low is None or high is None:
        return None
    return Spread(low, high, None, ("Shaded: 1st to 99th percentile over tokens.",))


def aligned(found: xr.DataArray | None, curve: xr.DataArray) -> Array | None:
    """Values of another variable at the points of a curve; None where the curve has no label for a dimension."""
    if found is None:
        return None
    for dim in [dim for dim in found.dims if dim not in curve.dims]:
        if dim not in curve.coords:
            return None
        found = found.sel({dim: curve.coords[dim].item()})
    return np.asarray(found.transpose(*curve.dims).values, dtype=np.float64)


FEWEST = 3
"""Runs from which the mean has an interval: of two it reaches 13 standard errors to each side."""


def folded(figure: Lines, group_of: Mapping[str, str]) -> Lines:
    """Curves of runs that belong together, as one curve with a band.

    ``group_of``: run → what its group is called; a run that is missing stays as it is.
    Returns: A curve for each group and variant, in the colour of the first run of the group; runs that were measured at
    other positions than the first ones of their group stay single curves.
    """
    if not group_of:
        return figure
    gathered: dict[tuple[str, str, bytes], list[Line]] = {}
    others: list[Line] = []
    nulls: dict[tuple[str, str], Line] = {}
    for line in figure.lines:
        group = group_of.get(line.group)
        variant = line.label.removeprefix(line.group)
        if line.role == "threshold" or group is None:
            others.append(line)
        elif line.role == "measured":
            gathered.setdefault((group, variant, np.asarray(line.x, dtype=float).tobytes()), []).append(line)
        elif line.role == "null":  # that of the sample size, which the runs of a group share
            nulls.setdefault((group, variant), replace(line, label=f"{group}{variant}", group=group))
        else:
            others.append(replace(line, group=group))
    joined = [_joined(lines, group, variant) for (group, variant, _), lines in gathered.items()]
    most = max((len(lines) for lines in gathered.values()), default=0)
    note = ""
    if most > 1:
        note = f"Lines: the mean of up to {most} runs; bands: from the smallest to the largest of them."
    if any(line.error is not None for line in joined):
        note += f" Whiskers: {100 * LEVEL:g} % interval of the mean over runs."
    # A null has the colour of the measured line before it.
    ordered = sorted([*joined, *nulls.values()], key=lambda line: list(group_of.values()).index(line.group))
    return replace(
        figure,
        lines=(*ordered, *others),
        caption=f"{note} {figure.caption}".strip(),
        runs=folded_colours(figure.runs, group_of),
    )


def folded_colours(runs: Mapping[str, int], group_of: Mapping[str, str]) -> dict[str, int]:
    """The number of the colour of each group: that of its first run."""
    found: dict[str, int] = {}
    for run, number in runs.items():
        found.setdefault(group_of.get(run, run), number)
    return found


def _joined(lines: list[Line], group: str, variant: str) -> Line:
    name = f"{group}{variant}"
    if len(lines) == 1:
        return replace(lines[0], label=name, group=group)
    values = np.stack([np.asarray(line.y, dtype=float) for line in lines])
    is_known = np.isfinite(values)
    counts = is_known.sum(axis=0)
    # Of no numbers there is no mean, and numpy would warn.
    mean = np.where(counts > 0, np.where(is_known, values, 0.0).sum(axis=0) / np.maximum(counts, 1), np.nan)
    low, high = (
        np.where(counts > 0, reduce(np.where(is_known, values, fill), axis=0), np.nan)
        for reduce, fill in ((np.min, np.inf), (np.max, -np.inf))
    )
    squares = (np.where(is_known, values - mean, 0.0) ** 2).sum(axis=0)
    degrees = np.maximum(counts - 1, 1)
    reach = np.array([factor(each) for each in degrees]) * np.sqrt(squares / degrees / np.maximum(counts, 1))
    error = np.where(counts >= FEWEST, reach, np.nan) if len(lines) >= FEWEST else None
    return replace(lines[0], y=mean, lower=low, upper=high, error=error, label=name, group=group)
