"""What may a metric be called on? Labelled arrays, a trace or a run become the trace that its quantities are read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.quantities.registry import LABELS, sources, with_facts
from depthscope.diagnostics.schema import STATISTICS, TRACE


def split_options(name: str, options: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, xr.DataArray]]:
    """Labels by dim and arrays by name among the keyword arguments of a metric.

    ``options``: labels by dim, ``center``, and arrays by name.
    Raises InputError: For another option, or a label that its dim does not have.
    """
    labels: dict[str, str] = {}
    arrays: dict[str, xr.DataArray] = {}
    unknown: list[str] = []
    for key, value in options.items():
        # Recognised by type: names of arrays are those of variables, which `bind_arrays` checks.
        if isinstance(value, xr.DataArray):
            arrays[key] = value
        # The name of this option in the kernels, for the dim `centering` of an analysis.
        elif key == "center":
            labels["centering"] = "centred" if value else "raw"
        elif key not in LABELS:
            unknown.append(key)
        elif value not in LABELS[key]:
            raise InputError(f"{key} is {value!r}; expected one of {', '.join(map(repr, LABELS[key]))}")
        else:
            labels[key] = value
    if unknown:
        raise InputError(
            f"{name} got the options {sorted(unknown)}; it knows center, mask, {', '.join(LABELS)}"
        )
    return labels, arrays


def bind_arrays(
    name: str, roots: Sequence[str], data: Sequence[Any], arrays: Mapping[str, xr.DataArray]
) -> tuple[xr.Dataset, list[str]]:
    """A trace of bare arrays, given by name or in the order of the variables that have none.

    ``roots``: the variables of a run that it is computed from.
    Returns: The dims of size 1 that no array had.
    Raises InputError: For too few or too many arrays, or dims that a variable does not have.
    """
    by_order = [root for root in roots if root not in arrays]
    if len(data) != len(by_order) or not set(arrays) <= set(roots):
        raise InputError(
            f"{name} got {len(data) + len(arrays)} arrays; expected {', '.join(roots)}, or a run"
        )
    bound = dict(zip(by_order, data, strict=True))
    bound.update(arrays)
    complete = {root: _with_all_dims(array, root, name).rename(root) for root, array in bound.items()}
    had = {str(dim) for array in bound.values() for dim in array.dims}
    added = {str(dim) for array in complete.values() for dim in array.dims} - had
    return xr.Dataset(complete), sorted(added)


def _with_all_dims(array: xr.DataArray, root: str, name: str) -> xr.DataArray:
    """The array with every dim of its variable, those that it lacks with size 1."""
    # A root that is no variable of the trace is one of the statistics, see `registry.sources`.
    dims = (TRACE[root] if root in TRACE else STATISTICS[root]).dims
    unknown = [str(dim) for dim in array.dims if dim not in dims]
    if unknown:
        raise InputError(
            f"{name} got {root} with the dims {', '.join(unknown)}; expected some of {', '.join(dims)}"
        )
    # With size 1, so that quantities need no case for arrays with fewer dims.
    missing = [dim for dim in dims if dim not in array.dims]
    return array.expand_dims(missing).transpose(*dims)


def trace_of(name: str, data: Sequence[Any]) -> xr.Dataset:
    """The trace of a run, of a node of it, or the dataset that is one.

    Returns: With what metrics need of the statistics, where it is a run that has some.
    """
    if len(data) != 1 or not isinstance(data[0], xr.Dataset | xr.DataTree):
        kinds = ", ".join(type(item).__name__ for item in data) or "nothing"
        raise InputError(f"{name} got {kinds}; expected labelled arrays, a trace or a run")
    if isinstance(data[0], xr.Dataset):
        return data[0]
    run = data[0]
    # A node such as run['trace/decoder'] is a trace itself.
    trace = run.children.get("trace", run)
    if trace.children:
        raise InputError(
            f"{name} got several chains: {', '.join(trace.children)}; choose one, such as run['trace/NAME']"
        )
    # A node has none: metrics of weights and of streamed sums need the run itself.
    statistics = run.children.get("statistics")
    known = with_facts(trace.to_dataset(), run.attrs)
    return sources(known, None if statistics is None else statistics.to_dataset())


def with_mask(trace: xr.Dataset, mask: Any) -> xr.Dataset:
    """A trace with another mask.

    ``mask``: (sample, token), or of that many entries: a slice of one sequence has no dim ``sample``.
    """
    # Only labels tell the order; a bare array is taken as (sample, token).
    if isinstance(mask, xr.DataArray) and mask.ndim == 2:
        mask = mask.transpose("sample", "token")
    values = np.asarray(mask)
    shape = (trace.sizes["sample"], trace.sizes["token"])
    if values.dtype != bool or values.size != np.prod(shape):
        raise InputError(f"mask has shape {values.shape} and dtype {values.dtype}; expected booleans {shape}")
    return trace.assign(mask=(("sample", "token"), values.reshape(shape)))
