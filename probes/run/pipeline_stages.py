"""How do the runs of a pipeline's stages become one run? Depth after depth, the state that two stages share counted once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.diagnostics.errors import InputError

STAGE = "pipeline_stage"
"""Attribute of a run: the number of its stage, and how many there are."""

SAME = ("family", "n_streams", "layout", "orientation", "dtype", "autocast", "seed", "processes")
ADDED = ("num_blocks", "num_parameters", "sites_expected", "sites_fired")
DROPPED = (
    *(STAGE, "memory", "coverage", "remarks", "weights_digest", "consequences", "rescaled", "scale_slopes"),
)
JOINED = ("depth", "connection", "weight")
CLOSE = 1e-6  # of two states, relative to the largest: the same numbers, but for a cast on the way


def stage_attribute(stage: tuple[int, int]) -> dict[str, Any]:
    """The attribute of a run of one stage.

    ``stage``: the number of the stage, from 0 on, and how many there are.
    """
    number, stages = stage
    if not 0 <= number < stages:
        raise InputError(
            f"stage is {stage}; expected (number, how many), with a number from 0 to {stages - 1}"
        )
    return {STAGE: [int(number), int(stages)]}


def join_stages(runs: Sequence[xr.DataTree]) -> xr.DataTree:
    """Join the runs of all stages of one pipeline, in any order, to the run of the model.

    ``runs``: one of each stage, with the attribute `STAGE`, over the same data and steps. Blocks that every stage
    numbers from 0 on get the numbers that follow those of the stage before.
    Returns: ``/trace`` and ``/statistics`` with the depths of all stages. Metrics over all depths are those of
    `analyze`: live ones of single stages are left out, and so are streamed sums, which compare the depths of a stage.
    Raises InputError: Where a stage is missing or comes twice, where the runs have several chains, other steps or other
    data, and where the last state of a stage is not the first one of the next.
    """
    ordered = _in_order(runs)
    for run in ordered:
        if schema.chains(run) != [""]:
            raise InputError(f"a stage has the chains {schema.chains(run)}; expected one chain in each stage")
    _require_same_attributes(ordered)
    traces = [run["trace"].to_dataset() for run in ordered]
    _require_joints(traces)
    joined = {"trace": _joined(traces)}
    if all("statistics" in run for run in ordered):
        parts = [run["statistics"].to_dataset() for run in ordered]
        _require_same_steps(parts)
        joined["statistics"] = _joined(parts)
    return schema.create_run(**joined, attrs=_attributes(ordered))


def _in_order(runs: Sequence[xr.DataTree]) -> list[xr.DataTree]:
    if not all(STAGE in run.attrs for run in runs):
        raise InputError(
            f"some runs have the attribute {STAGE} and some do not; expected the stages of one pipeline, or none"
        )
    numbers = [tuple(map(int, np.asarray(run.attrs[STAGE]).tolist())) for run in runs]
    stages = numbers[0][1]
    if sorted(numbers) != [(number, stages) for number in range(stages)]:
        came = ", ".join(f"{number} of {of}" for number, of in sorted(numbers))
        raise InputError(f"the runs are of the stages {came}; expected each of 0 to {stages - 1} once")
    return [runs[numbers.index((number, stages))] for number in range(stages)]


def _require_same_attributes(runs: Sequence[xr.DataTree]) -> None:
    for name in SAME:
        values = [run.attrs.get(name) for run in runs]
        if any(value != values[0] for value in values):
            raise InputError(f"{name} is {values} in the stages; expected the same in all, of one model")


def _require_joints(traces: Sequence[xr.Dataset]) -> None:
    """Require that each stage begins where the one before ended."""
    for number, (before, after) in enumerate(pairwise(traces)):
        last, first = before["residual"].isel(depth=-1).values, after["residual"].isel(depth=0).values
        same = last.shape == first.shape and np.array_equal(before["mask"], after["mask"])
        with np.errstate(invalid="ignore"):
            size = np.nanmax(np.abs(last), initial=0.0)
            close = same and np.allclose(last, first, rtol=0.0, atol=CLOSE * size, equal_nan=True)
        if not close:
            raise InputError(
                f"the last state of stage {number} ({last.shape}) is not the first one of stage {number + 1} ({first.shape}); "
                "expected runs over the same data, whose stages follow each other without a layer between"
            )


def _require_same_steps(parts: Sequence[xr.Dataset]) -> None:
    for name in ("step", "token_count", "sequence_count"):
        values = [part[name].values.tolist() for part in parts]
        if any(value != values[0] for value in values):
            raise InputError(
                f"{name} is {values[:2]} in two stages; expected the same steps over the same data"
            )


def _joined(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """The depths, connections and weights of all parts, numbered on."""
    whole, depths, connections, layers = [], 0, 0, 0
    for number, part in enumerate(parts):
        own = part.drop_vars(
            [name for name in part.variables if name in (*schema.OF_STREAMING, "other_depth")]
        )
        shift = depths - int(own["depth"][0])
        layer_shift = _layer_shift(own["layer"].values, layers, number)
        own = _numbered_on(own, shift, connections, layer_shift)
        layers = int(own["layer"].max()) + 1
        connections += own.sizes.get("connection", 0)
        # The last state of the stage before is the first one of this stage.
        whole.append(own if number == 0 else own.isel(depth=slice(1, None)))
        depths = int(own["depth"][-1])
    variables = dict.fromkeys(name for part in reversed(whole) for name in part.data_vars)
    found = {}
    for name in variables:
        having = [part[name] for part in whole if name in part]
        axis = next((dim for dim in JOINED if dim in having[0].dims), None)
        if axis is None:
            found[name] = having[-1]  # such as the loss, which only the last stage has
            continue
        expected = [part for part in whole if axis in part.dims]
        if len(having) < len(expected):
            raise InputError(
                f"only {len(having)} of {len(expected)} stages have {name}; expected the same of all"
            )
        joined = xr.concat(having, axis, combine_attrs="override", coords="minimal", compat="override")
        found[name] = joined.transpose(*having[0].dims)
        for listed in (schema.WITHOUT_GRADIENT, schema.CUT_GRADIENT):
            of_all = [int(depth) for part in having for depth in np.atleast_1d(part.attrs.get(listed, []))]
            if of_all:
                found[name].attrs[listed] = of_all
    return xr.Dataset(found, attrs=whole[0].attrs)


def _layer_shift(layers: np.ndarray, known: int, number: int) -> int:
    """By how much the numbers of a stage's blocks are raised: they go on, or begin at 0 in each stage."""
    of_blocks = layers[layers >= 0]
    first = int(of_blocks.min()) if len(of_blocks) else known
    if first == known:
        return 0
    if first == 0:
        return known
    raise InputError(
        f"the blocks of stage {number} begin with number {first} and {known} blocks come before; expected {known}, or 0"
    )


def _numbered_on(part: xr.Dataset, depths: int, connections: int, layers: int) -> xr.Dataset:
    """A part with the numbers of its depths, connections and blocks in the complete model."""
    changed = part.copy()  # whose attributes are written below
    changed = changed.assign_coords(depth=part["depth"] + depths)
    for name in ("layer", "connection_layer", "weight_layer"):
        if name in changed.coords:
            of = changed[name]
            changed = changed.assign_coords({name: of.where(of < 0, of + layers)})
    if "connection" in changed.coords:
        changed = changed.assign_coords(connection=changed["connection"] + connections)
    for name in ("depth_in", "depth_out"):
        if name in changed.coords:
            changed = changed.assign_coords({name: changed[name] + depths})
    for variable in changed.data_vars.values():
        _number_lists(variable, depths)
    return changed


def _number_lists(variable: xr.DataArray, depths: int) -> None:
    """Number the depths on that attributes of a variable list; the first one of a later stage is no depth of its own."""
    for listed in (schema.WITHOUT_GRADIENT, schema.CUT_GRADIENT):
        if listed in variable.attrs:
            shifted = [int(depth) + depths for depth in np.atleast_1d(variable.attrs[listed])]
            variable.attrs[listed] = [depth for depth in shifted if depths == 0 or depth != depths]


def _attributes(runs: Sequence[xr.DataTree]) -> dict[str, Any]:
    """What the stages together are."""
    found = {str(name): value for name, value in runs[0].attrs.items() if name not in DROPPED}
    # How the loss is made is known where it is made.
    found.update({name: runs[-1].attrs[name] for name in ("loss_reduction",) if name in runs[-1].attrs})
    for name in ADDED:
        found[name] = sum(int(run.attrs[name]) for run in runs if name in run.attrs)
    for name in ("sites_expected", "sites_fired"):
        found[name] -= len(runs) - 1  # the states that two stages share
    errors = [float(run.attrs["reconstruction_error"]) for run in runs if "reconstruction_error" in run.attrs]
    if errors:
        found["reconstruction_error"] = max(errors)
    unproven = [run.attrs["proof"] for run in runs if run.attrs.get("proof") not in (None, schema.PROVEN)]
    if unproven:
        found["proof"] = unproven[0]
    parts_left_out = [part for run in runs for part in run.attrs.get("not_covered", [])]
    if parts_left_out:
        found["not_covered"] = parts_left_out
    digests = [run.attrs.get("weights_digest") for run in runs]
    if None not in digests:
        found["weights_digest"] = hashlib.sha256("".join(map(str, digests)).encode()).hexdigest()
    return {**found, "pipeline_stages": len(runs)}
