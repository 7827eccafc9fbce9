"""How does ``/statistics`` come from the sums of the measured steps? One row per step, as arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.probes.connections.proof import Evidence
from depthscope.probes.run.connection_variables import connection_coords
from depthscope.probes.run.coverage import depth_coords, without_gradient
from depthscope.probes.statistics.token_sums import Sums, TokenSums, stacked
from depthscope.probes.statistics.weight_updates import WeightNorms
from depthscope.probes.structure.chain import Chain

DIRECTIONS = np.array(["forward", "backward"], dtype=object)
GRADIENT = "gradient_square_norm_sum"
OF_HEADS = ("attention_query_count", "attention_entropy_sum", "sink_mass_sum")
PROFILES = ("norm_sum", "square_norm_sum", "norm_max", "abs_max", "adjacent_cosine_sum", GRADIENT)


@dataclass(frozen=True)
class StepStatistics:
    """The statistics of one measured step, one entry per chain; `RowSums` stay small."""

    step: int
    sums: Sequence[Sums]
    sequences: int
    loss: float | None
    weights: WeightNorms | None = None
    scale: float | None = None
    loss_rise: float = math.nan
    loss_terms: float | None = None
    digest: float | None = None  # of the batches


def statistics_dataset(
    chain: Chain,
    number: int,
    depths: list[int],
    rows: list[StepStatistics],
    pooled: list[TokenSums],
    evidence: Evidence,
    cells: Mapping[int, Sequence[str]],
) -> xr.Dataset:
    """The statistics of one group, without those of the weights.

    ``rows`` has one entry per measured step; ``pooled`` the sums of all steps since the weights last changed, one per chain;
    ``cells`` tells the biases and gates of the connections, see `mixing_statistics`.
    """
    variables, of_parameters = step_variables(number, depths, rows, evidence, cells)
    for name in ("feature_sum", "unit_sum"):  # too wide for one row per step
        values_LND = stacked(pooled[number : number + 1], name, depths)[0]
        variables[name] = (("depth", "stream", "feature"), values_LND)
    coords = depth_coords(chain, depths)
    coords["step"] = np.array([row.step for row in rows])
    coords["stream"] = np.arange(variables["unit_pair_sum"][1].shape[2])
    if evidence.proofs:
        coords.update(connection_coords(chain.connections))
        coords["direction"] = DIRECTIONS
    return xr.Dataset(variables, {**coords, **of_parameters})


def step_variables(
    number: int,
    depths: list[int],
    rows: list[StepStatistics],
    evidence: Evidence,
    cells: Mapping[int, Sequence[str]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The variables of one group that have a value for every measured step, as (dims, array) or (dims, array, attributes).

    The second one has the coordinates of the biases and gates.
    """
    sums = [row.sums[number] for row in rows]
    variables: dict[str, Any] = {
        # Of the first depth: all states of a group have the same tokens.
        "token_count": ("step", stacked(sums, "token_count", depths[:1])[:, 0]),
        "sequence_count": ("step", np.array([float(row.sequences) for row in rows])),
    }
    losses, scales = [row.loss for row in rows], [row.scale for row in rows]
    of_step = {
        "loss": losses,
        # Apart from the loss, whose NaN may be the loss itself, or that there is none.
        "loss_not_finite": [None if loss is None else float(not math.isfinite(loss)) for loss in losses],
        "loss_rise": [None if row.loss is None else row.loss_rise for row in rows],
        "loss_scale": scales,
        "loss_terms": [row.loss_terms for row in rows],
        "batch_digest": [row.digest for row in rows],
    }
    for name, values in of_step.items():
        if any(value is not None for value in values):
            variables[name] = ("step", np.array([math.nan if value is None else value for value in values]))
    variables.update(_profile_variables(sums, depths))
    # Σ_{i≠j} u_i·u_j over all pairs of unit vectors = ‖Σ u‖² − number of them: the mean cosine without forming any pair.
    pairs = stacked(sums, "unit_square", depths) - stacked(sums, "unit_count", depths)
    variables["unit_pair_sum"] = (schema.PROFILE, pairs)
    for name in OF_HEADS:
        if any(of.array(name, depths) is not None for of in sums):
            variables[name] = (schema.STATISTICS[name].dims, stacked(sums, name, depths))
    coords: dict[str, Any] = {}
    if evidence.proofs:  # only stream connections have gains: a plain block's is 1
        variables.update(_gain_variables(sums, evidence))
        of_mixing, coords = mixing_statistics(sums, len(evidence.proofs), cells)
        variables.update(of_mixing)
    return variables, coords


def _profile_variables(sums: Sequence[Sums], depths: list[int]) -> dict[str, Any]:
    """What was added up at every depth in every step."""
    found: dict[str, Any] = {}
    for name in PROFILES:
        if any(of.array(name, depths) is not None for of in sums):
            found[name] = (schema.PROFILE, stacked(sums, name, depths))
    if GRADIENT in found:
        reached = {depth for of in sums for depth in of.keys(GRADIENT)}
        found[GRADIENT] = (*found[GRADIENT], without_gradient(depths, reached))
    return found


def _gain_variables(sums: Sequence[Sums], evidence: Evidence) -> dict[str, Any]:
    """The gains along both axes of the mixing matrices, forward and backward."""
    keys = list(range(len(evidence.proofs)))
    if all(of.array("gain_sum", keys) is None for of in sums):
        return {}
    variables: dict[str, Any] = {}
    for name in ("gain_sum", "gain_max"):
        # (step, connection, 2): the gain along the matrix's last axis, then along the one before.
        gains = stacked(sums, name, keys)
        variables[name] = (schema.GAIN, np.moveaxis(gains, -1, 1).copy())
    return variables


PARAMETER = "connection_parameter"


def mixing_statistics(
    sums: Sequence[Sums], num_connections: int, cells: Mapping[int, Sequence[str]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Variables and coordinates of ``/statistics`` of the connections with streams.

    ``cells``: for each connection the parameter that each of its stored values belongs to, see `ConnectionParameters`.
    """
    keys, variables = list(range(num_connections)), {}
    for name in schema.SUMS_OF_COEFFICIENTS:
        if any(of.array(name, keys) is not None for of in sums):
            variables[name] = (schema.STATISTICS[name].dims, stacked(sums, name, keys))
    of_parameters, coords = _parameters(sums, cells)
    return variables | of_parameters, coords


def _parameters(
    sums: Sequence[Sums], cells: Mapping[int, Sequence[str]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The biases and gates of all connections."""
    numbers = [number for number in cells if any(of.array(PARAMETER, [number]) is not None for of in sums)]
    if not numbers:
        return {}, {}
    values = np.concatenate([stacked(sums, PARAMETER, [number])[:, 0] for number in numbers], axis=1)
    owner = np.array([name for number in numbers for name in cells[number]], dtype=object)
    return {PARAMETER: (schema.STATISTICS[PARAMETER].dims, values)}, {"cell_parameter": ("cell", owner)}
