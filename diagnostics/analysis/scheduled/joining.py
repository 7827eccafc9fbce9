"""How do values of parts become those of the run? Along depths, connections or sequences; of pairs as blocks of a matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.analysis.scheduled.tasks import (
    CONNECTION,
    PAIR,
    SEQUENCE,
    WHOLE,
    Task,
    TaskResult,
)
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.metrics.mixing import LARGEST_TOKEN
from depthscope.diagnostics.quantities.registry import Quantities

UNDEFINED_BECAUSE = "undefined_because"


def joined(
    parts: Sequence[tuple[Task, Mapping[str, TaskResult]]],
) -> tuple[dict[str, xr.DataArray], dict[str, str]]:
    """Join what the tasks of one chain measured.

    Returns: Variables by name; and of metrics that were not computed, also where this is so of one block, the reason.
    """
    reasons: dict[str, str] = {}
    by_variable: dict[str, list[tuple[Task, xr.DataArray]]] = {}
    owners: dict[str, str] = {}
    for task, results in parts:
        for metric, (found, reason) in results.items():
            if reason:
                reasons.setdefault(metric, reason)
            for name, value in found.items():
                by_variable.setdefault(name, []).append((task, value))
                owners[name] = metric
    variables: dict[str, xr.DataArray] = {}
    for name, of in by_variable.items():
        if owners[name] in reasons:
            continue
        if of[0][0].kind == SEQUENCE:
            whole = _along("sequence", of)
            # Their mean over sequences, with its error; such a metric has no null that is computed.
            variables |= CATALOGUE[name].finished(whole, Quantities(xr.Dataset()))
        else:
            variables[name] = _one(of)
    return variables, reasons


def _one(parts: Sequence[tuple[Task, xr.DataArray]]) -> xr.DataArray:
    task, first = parts[0]
    axis = "connection" if task.kind == CONNECTION else "depth"
    # A null may depend on the number of tokens alone.
    if task.kind == WHOLE or len(parts) == 1 or axis not in first.dims:
        return first
    return _matrix(parts) if task.kind == PAIR and "other_depth" in first.dims else _along(axis, parts)


def _along(axis: str, parts: Sequence[tuple[Task, xr.DataArray]]) -> xr.DataArray:
    """Parts one after the other."""
    ordered = [value for _, value in sorted(parts, key=lambda part: part[0].keep)]
    whole = xr.concat(ordered, axis, coords="minimal", compat="override", combine_attrs="override")
    whole.attrs = _attributes(ordered, whole)
    return whole


def _matrix(parts: Sequence[tuple[Task, xr.DataArray]]) -> xr.DataArray:
    """A matrix of its blocks: each task has those of two groups of depths with each other and with themselves."""
    first = parts[0][1]
    dims = [dim for dim in first.dims if dim not in ("depth", "other_depth")]
    count = 1 + max(max(task.positions) for task, _ in parts)
    values = np.full((*(first.sizes[dim] for dim in dims), count, count), np.nan)
    along: dict[str, dict[int, Any]] = {}
    for task, value in parts:
        block = value.transpose(*dims, "depth", "other_depth").values
        at = np.array(task.positions)
        is_first = np.isin(at, task.keep)
        # What a block has with itself is in one task alone; of others only what is between the two.
        for rows, columns in (
            ((is_first, ~is_first), (~is_first, is_first)) if not is_first.all() else [(is_first, is_first)]
        ):
            values[..., at[rows][:, None], at[columns]] = block[..., rows, :][..., columns]
        for name, coord in value.coords.items():
            if coord.dims == ("depth",):
                along.setdefault(str(name), {}).update(
                    zip(task.positions, coord.values.tolist(), strict=True)
                )
    coords: dict[str, Any] = {
        name: ("depth", np.array([of[i] for i in range(count)], first[name].dtype))
        for name, of in along.items()
    }
    coords["other_depth"] = ("other_depth", np.array(coords["depth"][1]))
    coords |= {
        str(name): of for name, of in first.coords.items() if not {"depth", "other_depth"} & set(of.dims)
    }
    matrix = xr.DataArray(values, coords, (*dims, "depth", "other_depth"), first.name, dict(first.attrs))
    matrix.attrs = _attributes([value for _, value in parts], matrix)
    return matrix.transpose(*first.dims)


def _attributes(parts: Sequence[xr.DataArray], whole: xr.DataArray) -> dict[str, Any]:
    """The attributes of all parts: those by depth or connection together, and a reason for NaN only where all is NaN."""
    found: dict[str, Any] = {}
    for part in parts:
        for name, value in part.attrs.items():
            if name == LARGEST_TOKEN:  # by the first dim, then by connection
                before = found.get(name, [[] for _ in value])
                found[name] = [[*own, *more] for own, more in zip(before, value, strict=True)]
            elif isinstance(value, dict):
                found[name] = {**found.get(name, {}), **value}
            else:
                found.setdefault(str(name), value)
    if UNDEFINED_BECAUSE in found and not whole.isnull().all():
        del found[UNDEFINED_BECAUSE]
    return found
