"""Which numbers of an analysis does a selection name? One labelled slice, its positions and their names."""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from depthscope.app.figures.specification import Analyses, Array, Lines, Selection
from depthscope.app.text.visible import LONGEST_NAME, visible
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


def pick(data: xr.Dataset, name: str, choice: Selection, **fixed: str) -> xr.DataArray | None:
    """The slice of one variable that a selection names; None where the run has no such variable or label."""
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
    for dim in LABELLED:
        if dim not in array.dims:
            continue
        # `fixed` wins: a curve of one direction asks for it where the selection has both.
        label, labels = fixed.get(dim, getattr(choice, dim)), array[dim].values.tolist()
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
