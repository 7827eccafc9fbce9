"""How does ``/statistics`` come from the sums of the measured steps? One row per step, as arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.probes.run.connection_variables import connection_coords
from depthscope.probes.run.coverage import depth_coords, without_gradient
from depthscope.probes.statistics.token_sums import TokenSums
from depthscope.probes.statistics.weight_updates import WeightNorms
from depthscope.probes.structure.chain import Chain

DIRECTIONS = np.array(["forward", "backward"], dtype=object)
GRADIENT = "gradient_square_norm_sum"
OF_HEADS = ("attention_query_count", "attention_entropy_sum", "sink_mass_sum")
PARAMETER = "connection_parameter"
PROFILES = ("norm_sum", "square_norm_sum", "norm_max", "abs_max", "adjacent_cosine_sum", GRADIENT)


@dataclass(frozen=True)
class StepStatistics:
    """The statistics of one measured step, one entry per chain; see `TokenSums.compact`."""

    step: int
    sums: Sequence[TokenSums]
    sequences: int
    loss: float | None
    weights: WeightNorms | None = None
    scale: float | None = None
    loss_rise: float = math.nan
    loss_terms: float | None = None
    digest: float | None = None  # of the batches


def statistics_dataset(
    chain: Chain,
    depths: list[int],
    step: int,
    pooled: TokenSums,
    numbers: Mapping[str, Any],
    coords: Mapping[str, Any],
    *,
    has_connections: bool,
) -> xr.Dataset:
    """The statistics of one group in one step, with those of all steps since the weights last changed, ``pooled``."""
    by_step = {
        name: (("step", *dims), values[None], *attrs) for name, (dims, values, *attrs) in numbers.items()
    }
    for name in ("feature_sum", "unit_sum"):  # too wide for one row per step
        by_step[name] = (("depth", "stream", "feature"), _array(pooled, name, depths))
    axes = {"step": [step], "stream": np.arange(by_step["unit_pair_sum"][1].shape[2])}
    if has_connections:
        axes |= {**connection_coords(chain.connections), "direction": DIRECTIONS}
    return xr.Dataset(by_step, {**coords, **depth_coords(chain, depths), **axes})


def step_variables(
    number: int,
    depths: list[int],
    row: StepStatistics,
    num_connections: int,
    cells: Mapping[int, Sequence[str]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The variables of one group that have a value for every measured step, as (dims, array) or (dims, array, attributes).

    The second one has the coordinates of the biases and gates.
    """
    sums, keys = row.sums[number], list(range(num_connections))
    known = {
        # Of the first depth: all states of a group have the same tokens.
        "token_count": float(_array(sums, "token_count", depths[:1])[0]),
        "sequence_count": float(row.sequences),
        "loss": row.loss,
        # Apart from the loss, whose NaN may be the loss itself, or that there is none.
        "loss_not_finite": None if row.loss is None else float(not math.isfinite(row.loss)),
        "loss_rise": None if row.loss is None else row.loss_rise,
        "loss_scale": row.scale,
        "loss_terms": row.loss_terms,
        "batch_digest": row.digest,
    }
    variables: dict[str, Any] = {
        name: ((), np.asarray(value)) for name, value in known.items() if value is not None
    }
    # What was added up at every depth, connection or head.
    names = {
        **dict.fromkeys((*PROFILES, *OF_HEADS), depths),
        **dict.fromkeys(schema.SUMS_OF_COEFFICIENTS, keys),
    }
    for name, places in names.items():
        values = sums.array(name, places) if places else None
        if values is not None:
            variables[name] = (schema.STATISTICS[name].dims[1:], values)
    if GRADIENT in variables:
        variables[GRADIENT] = (*variables[GRADIENT], without_gradient(depths, set(sums.keys(GRADIENT))))
    # Σ_{i≠j} u_i·u_j over all pairs of unit vectors = ‖Σ u‖² − number of them: the mean cosine without forming any pair.
    pairs = _array(sums, "unit_square", depths) - _array(sums, "unit_count", depths)
    variables["unit_pair_sum"] = (schema.PROFILE[1:], pairs)
    if not num_connections:  # only stream connections have gains: a plain block's is 1
        return variables, {}
    for name in ("gain_sum", "gain_max"):
        # (connection, 2): the gain along the matrix's last axis, then along the one before.
        gains = sums.array(name, keys)
        if gains is not None:
            variables[name] = (schema.GAIN[1:], np.moveaxis(gains, -1, 0).copy())
    # The biases and gates of all connections.
    measured = {at: of[0] for at in cells if (of := sums.array(PARAMETER, [at])) is not None}
    if not measured:
        return variables, {}
    variables[PARAMETER] = (("cell",), np.concatenate(list(measured.values())))
    owner = np.array([name for at in measured for name in cells[at]], dtype=object)
    return variables, {"cell_parameter": ("cell", owner)}


def _array(sums: TokenSums, name: str, keys: Sequence[int]) -> np.ndarray:
    found = sums.array(name, keys)
    assert found is not None
    return found
