"""Tensors in, datasets out: the one room where torch meets xarray."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import numpy as np
import torch
import xarray as xr

from diagnostics import schema
from probes.accumulate import Sums
from probes.chain import Chain
from probes.connections import read_error, tolerance
from probes.proof import Evidence, Joint, Reading, applied_matrix, gather_evidence, solved_branch
from probes.sampling import Sequence, padded, token_masks
from probes.session import Session

DIRECTIONS = np.array(["forward", "backward"], dtype=object)
SOFTWARE = ("torch", "transformers", "hyper-connections", "xarray", "numpy", "depthscope")


@dataclass(frozen=True)
class Row:
    """The statistics of one measured step; `Sums.compact` ones, so that many rows stay small."""

    step: int
    sums: list[Sums]
    sequences: int
    loss: float | None


def build_run(
    session: Session,
    rows: list[Row],
    pooled: list[Sums],
    *,
    attrs: Mapping[str, Any] | None = None,
    token_text: Any = None,
) -> xr.DataTree:
    """Turn what a session kept into a validated run.

    Parameters
    ----------
    session : Session
        With its chains found and at least one sequence kept.
    rows : list of Row
        Statistics, one per measured step.
    pooled : list of Sums
        Statistics of all steps since the weights last changed, one per chain.
    attrs : mapping, optional
        Attributes to add or replace.
    token_text : sequence of sequences of str, optional
        Text of every token, by the sequence's index.

    Returns
    -------
    DataTree

    Raises
    ------
    ReconstructionError
        Where a connection's parts do not give its next state.
    """
    sequences = sorted(session.reservoir.held.values(), key=lambda sequence: sequence.index)
    evidence = gather_evidence(session, sequences)
    trace: dict[str, xr.Dataset] = {}
    statistics: dict[str, xr.Dataset] = {}
    for number, chain in enumerate(session.chains):
        for name, depths in stages(session, number):
            trace[name] = _trace(session, number, depths, sequences, evidence, token_text)
            statistics[name] = _statistics(chain, number, depths, rows, pooled, evidence)
    return schema.create_run(
        trace if list(trace) != [""] else trace[""],
        statistics=statistics if list(statistics) != [""] else statistics[""],
        attrs=_attributes(session, sequences, evidence) | dict(attrs or {}),
    )


def stages(session: Session, number: int) -> list[tuple[str, list[int]]]:
    """Split a chain where the width or the number of tokens of its states changes.

    Parameters
    ----------
    session : Session
        With its chains found.
    number : int
        Which chain.

    Returns
    -------
    list of (name, depth indices)
    """
    chain = session.chains[number]
    groups: list[list[int]] = []
    for depth, shape in enumerate(chain.shapes):
        if groups and chain.shapes[groups[-1][-1]] == shape:
            groups[-1].append(depth)
        else:
            groups.append([depth])
    if len(groups) == 1:
        return [(chain.name, groups[0])]
    prefix = f"{chain.name}_" if chain.name else ""
    return [(f"{prefix}stage{i}", group) for i, group in enumerate(groups)]


# --- the trace ---


def _trace(
    session: Session,
    number: int,
    depths: list[int],
    sequences: list[Sequence],
    evidence: Evidence,
    token_text: Any,
) -> xr.Dataset:
    chain = session.chains[number]
    mask = np.stack(token_masks(sequences, number, depths[0]))
    tokens = mask.shape[1]
    states = [[padded(s.states[number, depth], tokens) for s in sequences] for depth in depths]
    residual = torch.stack([torch.stack(row) for row in states]).numpy()
    variables: dict[str, Any] = {
        "residual": (schema.STATE, residual),
        "mask": (("sample", "token"), mask),
    }
    if any(sequence.gradients for sequence in sequences):
        variables["gradient"] = (schema.STATE, _gradients(number, depths, sequences, residual.shape))
    coords: dict[str, Any] = _depth_coords(chain, depths) | {
        "sample": np.array([sequence.index for sequence in sequences]),
        "token": np.arange(tokens),
        "stream": np.arange(residual.shape[3]),
    }
    if chain.links:
        variables |= _connection_variables(evidence)
        coords |= _connection_coords(chain)
    if token_text is not None:
        variables["token_text"] = (("sample", "token"), _texts(token_text, sequences, tokens))
    return xr.Dataset(variables, coords)


def _gradients(
    number: int, depths: list[int], sequences: list[Sequence], shape: tuple[int, ...]
) -> np.ndarray:
    out = np.full(shape, np.nan, dtype=np.float32)
    for i, depth in enumerate(depths):
        for j, sequence in enumerate(sequences):
            gradient = sequence.gradients.get((number, depth))
            if gradient is not None:
                out[i, j] = padded(gradient, shape[2]).numpy()
    return out


def _depth_coords(chain: Chain, depths: list[int]) -> dict[str, Any]:
    places = [chain.places[depth] for depth in depths]
    return {
        "depth": np.array(depths),
        "layer": ("depth", np.array([place.layer for place in places])),
        "site": ("depth", np.array([place.site for place in places], dtype=object)),
        "module": ("depth", np.array([place.module for place in places], dtype=object)),
    }


def _connection_coords(chain: Chain) -> dict[str, Any]:
    count = len(chain.links)
    return {
        "connection": np.arange(count),
        "connection_layer": ("connection", np.array([link.layer for link in chain.links])),
        "branch": ("connection", np.array([link.branch for link in chain.links], dtype=object)),
        "connection_module": ("connection", np.array([link.path for link in chain.links], dtype=object)),
        "depth_in": ("connection", np.arange(count)),
        "depth_out": ("connection", np.arange(1, count + 1)),
    }


def _connection_variables(evidence: Evidence) -> dict[str, Any]:
    arrays: dict[str, list[np.ndarray]] = {
        name: [] for name in ("h_res", "h_pre", "h_post", "branch_in", "branch_out")
    }
    read_errors, rounding = [], []
    for number, joint in enumerate(evidence.joints):
        reading = evidence.reading(number)
        h_res = applied_matrix(joint, reading).float()
        returned = applied_matrix(joint, replace(reading, cast=False)).float()
        pre = joint.parts.pre if joint.parts.pre is not None else torch.full_like(joint.parts.post, math.nan)
        flat = joint.tokens()
        read_errors.append(
            math.nan
            if flat.parts.pre is None
            else read_error(flat.x_in, flat.parts.pre, flat.parts.branch_in)
        )
        rounding.append(float((h_res - returned).abs().max()))
        values = (h_res, pre, joint.parts.post, joint.parts.branch_in, _branch_out(joint, reading, h_res))
        for name, value in zip(arrays, values, strict=True):
            arrays[name].append(value.contiguous().numpy())
    variables: dict[str, Any] = {
        name: (schema.TRACE[name].dims, np.stack(values)) for name, values in arrays.items()
    }
    variables["reconstruction_error"] = ("connection", np.array(evidence.errors))
    variables["other_orientation_error"] = (
        "connection",
        np.array([_other(evidence, i) for i in range(len(evidence.proofs))]),
    )
    variables["read_error"] = ("connection", np.array(read_errors))
    variables["rounding"] = ("connection", np.array(rounding))
    return variables


def _other(evidence: Evidence, number: int) -> float:
    proof = evidence.proofs[number]
    other = proof.other if proof.reading.transposed == evidence.transposed else proof.error
    return other if math.isfinite(other) else math.nan


def _branch_out(joint: Joint, reading: Reading, h_res: torch.Tensor) -> torch.Tensor:
    if reading.observed and joint.branch_out is not None:
        return joint.branch_out
    rest = joint.x_out - torch.einsum("ktoi,ktid->ktod", h_res, joint.x_in)
    return solved_branch(rest, joint.parts.post)


def _texts(token_text: Any, sequences: list[Sequence], tokens: int) -> np.ndarray:
    out = np.full((len(sequences), tokens), "", dtype=object)
    for i, sequence in enumerate(sequences):
        if sequence.index < len(token_text):
            words = list(token_text[sequence.index])[:tokens]
            out[i, : len(words)] = words
    return out


# --- the statistics ---


def _statistics(
    chain: Chain, number: int, depths: list[int], rows: list[Row], pooled: list[Sums], evidence: Evidence
) -> xr.Dataset:
    sums = [row.sums[number] for row in rows]
    variables: dict[str, Any] = {
        "token_count": ("step", _stacked(sums, "token_count", depths[:1])[:, 0]),
        "sequence_count": ("step", np.array([float(row.sequences) for row in rows])),
    }
    if any(row.loss is not None for row in rows):
        variables["loss"] = ("step", np.array([math.nan if row.loss is None else row.loss for row in rows]))
    names = (
        "norm_sum",
        "square_norm_sum",
        "norm_max",
        "abs_max",
        "adjacent_cosine_sum",
        "gradient_square_norm_sum",
    )
    for name in names:
        if any(s.array(name, depths) is not None for s in sums):
            variables[name] = (schema.PROFILE, _stacked(sums, name, depths))
    unit_square = _stacked(sums, "unit_square", depths)
    pairs = unit_square - _stacked(sums, "unit_count", depths)
    variables["unit_pair_sum"] = (schema.PROFILE, pairs)
    for name in ("feature_sum", "unit_sum"):
        variables[name] = (
            ("depth", "stream", "feature"),
            _stacked(pooled[number : number + 1], name, depths)[0],
        )
    coords = _depth_coords(chain, depths) | {
        "step": np.array([row.step for row in rows]),
        "stream": np.arange(pairs.shape[2]),
    }
    if chain.links:
        variables |= _gains(sums, evidence)
        coords |= _connection_coords(chain) | {"direction": DIRECTIONS}
    return xr.Dataset(variables, coords)


def _stacked(sums: list[Sums], name: str, keys: list[int]) -> np.ndarray:
    arrays = [s.array(name, keys) for s in sums]
    known = [array for array in arrays if array is not None]
    return np.stack([np.full_like(known[0], np.nan) if array is None else array for array in arrays])


def _gains(sums: list[Sums], evidence: Evidence) -> dict[str, Any]:
    """The two sums of a matrix as its module keeps it become forward and backward by the proven orientation."""
    keys = list(range(len(evidence.proofs)))
    if all(s.array("gain_sum", keys) is None for s in sums):
        return {}
    variables: dict[str, Any] = {}
    for name in ("gain_sum", "gain_max"):
        pair = _stacked(sums, name, keys)  # step, connection, (last axis, the one before)
        ordered = pair[..., ::-1] if evidence.transposed else pair
        variables[name] = (schema.GAIN, np.moveaxis(ordered, -1, 1).copy())
    return variables


# --- the attributes ---


def _attributes(session: Session, sequences: list[Sequence], evidence: Evidence) -> dict[str, Any]:
    settings = session.settings
    known = {
        "model": type(session.model).__name__,
        "family": session.family,
        "n_streams": session.num_streams,
        "layout": session.layouts[0],
        "orientation": evidence.orientation,
        "reconstruction_error": max(evidence.errors) if evidence.proofs else None,
        "reconstruction_tolerance": tolerance(session.dtype) if evidence.proofs else None,
        "dtype": str(session.dtype).removeprefix("torch."),
        "block": session.chains[0].block_class,
        "num_blocks": len(session.chains[0].blocks),
        "num_parameters": sum(p.numel() for p in session.model.parameters()),
        "seed": settings.seed,
        "data_digest": _digest(sequences),
        "sampling": {
            "max_sequences": settings.max_sequences,
            "seed": settings.seed,
            "sequences_seen": session.reservoir.total,
            "sequences_kept": len(sequences),
        },
        "software": software(),
    }
    return {name: value for name, value in known.items() if value is not None}


def _digest(sequences: list[Sequence]) -> str:
    """SHA-256 over what the kept sequences showed the model."""
    digest = hashlib.sha256()
    for sequence in sequences:
        if sequence.row is not None:
            digest.update(sequence.row.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def software() -> dict[str, str]:
    """Versions of the packages that shape a run.

    Returns
    -------
    dict of str to str
    """
    versions = {}
    for name in SOFTWARE:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
