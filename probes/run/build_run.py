"""Tensors in, datasets out: the one room where torch meets xarray."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.probes.connections.coefficients import tolerance
from depthscope.probes.connections.proof import Evidence, gather_evidence
from depthscope.probes.run.connection_variables import (
    changes_outside,
    connection_coords,
    connection_variables,
)
from depthscope.probes.run.coverage import Coverage, coverage
from depthscope.probes.run.weight_variables import weight_variables
from depthscope.probes.run.weights_digest import weights_digest
from depthscope.probes.session.reservoir import Sequence, padded, token_masks, weights_stamp
from depthscope.probes.session.session import Session
from depthscope.probes.statistics.streamed_spectra import streamed_variables
from depthscope.probes.statistics.token_sums import TokenSums
from depthscope.probes.statistics.weight_updates import WeightNorms
from depthscope.probes.structure.chain import Chain
from depthscope.probes.structure.model_structure import FINAL

DIRECTIONS = np.array(["forward", "backward"], dtype=object)
SOFTWARE = ("torch", "transformers", "hyper-connections", "xarray", "numpy", "depthscope")


@dataclass(frozen=True)
class Row:
    """The statistics of one measured step; `TokenSums.compact` ones, so that many rows stay small."""

    step: int
    sums: list[TokenSums]
    sequences: int
    loss: float | None
    weights: WeightNorms | None = None
    scale: float | None = None


def build_run(
    session: Session,
    rows: list[Row],
    pooled: list[TokenSums],
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
    pooled : list of TokenSums
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
    covered = coverage(session, evidence)
    trace: dict[str, xr.Dataset] = {}
    statistics: dict[str, xr.Dataset] = {}
    for number, chain in enumerate(session.structure.chains):
        groups = stages(session, number)
        starts = [depths[0] for _, depths in groups]
        for stage, (name, depths) in enumerate(groups):
            trace[name] = _trace(session, number, depths, sequences, evidence, token_text)
            found, labels = weight_variables(
                [row.weights for row in rows], session.structure.chains, number, starts, stage
            )
            measured = _statistics(chain, number, depths, rows, pooled, evidence)
            statistics[name] = measured.assign(found).assign_coords(labels)
    return schema.create_run(
        trace if list(trace) != [""] else trace[""],
        statistics=statistics if list(statistics) != [""] else statistics[""],
        coverage=_coverage(covered),
        attrs=_attributes(session, sequences, evidence) | _counted(covered) | dict(attrs or {}),
    )


def stages(session: Session, number: int) -> list[tuple[str, list[int]]]:
    """Split a chain where the width or the number of tokens of its states changes; states not asked for are left out.

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
    chain = session.structure.chains[number]
    groups: list[list[int]] = []
    selection = session.options.selection
    kept = [depth for depth in range(len(chain.points)) if selection.keeps(chain, depth)]
    seen = [depth for depth in range(len(chain.points)) if selection.needs(chain, depth)]
    for depth in kept or seen:  # every analysis needs some states
        shape = chain.shapes[depth]
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
    chain = session.structure.chains[number]
    mask = np.stack(token_masks(sequences, number, depths[0]))
    tokens = mask.shape[1]
    states = [[padded(s.states[number, depth], tokens) for s in sequences] for depth in depths]
    residual = torch.stack([torch.stack(row) for row in states]).numpy()
    variables: dict[str, Any] = {
        "residual": (schema.STATE, residual),
        "mask": (("sample", "token"), mask),
    }
    if any(sequence.gradients for sequence in sequences):
        values = _gradients(number, depths, sequences, residual.shape)
        seen = {depth for sequence in sequences for owner, depth in sequence.gradients if owner == number}
        variables["gradient"] = (schema.STATE, values, _without(depths, seen))
    coords: dict[str, Any] = _depth_coords(chain, depths) | {
        "sample": np.array([sequence.index for sequence in sequences]),
        "token": np.arange(tokens),
        "stream": np.arange(residual.shape[3]),
    }
    if any(sequence.decoding for sequence in sequences):
        phases = ["decode" if sequence.decoding else "prefill" for sequence in sequences]
        coords["phase"] = ("sample", np.array(phases, dtype=object))
    if chain.connections and session.options.selection.connects(chain):
        variables |= connection_variables(session, number, sequences, evidence, tokens)
        coords |= connection_coords(chain.connections)
    variables |= _final(number, sequences, tokens, residual.shape[-1])
    if token_text is not None:
        variables["token_text"] = (("sample", "token"), _texts(token_text, sequences, tokens))
    trace = xr.Dataset(variables, coords)
    if "connection" not in trace.dims:
        return trace
    kept = [
        i
        for i, link in enumerate(chain.connections)
        if session.options.selection.keeps_connection(chain, link)
    ]
    return trace.isel(connection=kept)


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


def _without(depths: list[int], seen: set[int]) -> dict[str, list[int]]:
    """Which depths no gradient reached, as below frozen weights: they hold NaN, and nothing is wrong there."""
    missing = [depth for depth in depths if depth not in seen]
    return {schema.WITHOUT_GRADIENT: missing} if missing else {}


def _depth_coords(chain: Chain, depths: list[int]) -> dict[str, Any]:
    places = [chain.points[depth] for depth in depths]
    return {
        "depth": np.array(depths),
        "layer": ("depth", np.array([place.layer for place in places])),
        "site": ("depth", np.array([place.site for place in places], dtype=object)),
        "module": ("depth", np.array([place.module for place in places], dtype=object)),
    }


def _final(number: int, sequences: list[Sequence], tokens: int, width: int) -> dict[str, Any]:
    """The states behind the last norm and their gradients, where they have the chain's tokens and width."""
    found = {}
    for name, held in (("final", "states"), ("final_gradient", "gradients")):
        kept = [getattr(sequence, held).get((number, FINAL)) for sequence in sequences]
        whole = [t for t in kept if t is not None and t.shape[0] <= tokens and t.shape[-1] == width]
        if whole and len(whole) == len(kept):
            values = torch.stack([padded(t, tokens) for t in whole]).numpy()
            found[name] = (("sample", "token", "feature"), values)
    return found


def _texts(token_text: Any, sequences: list[Sequence], tokens: int) -> np.ndarray:
    out = np.full((len(sequences), tokens), "", dtype=object)
    for i, sequence in enumerate(sequences):
        if sequence.index < len(token_text):
            words = list(token_text[sequence.index])[:tokens]
            out[i, : len(words)] = words
    return out


# --- the statistics ---


def _statistics(
    chain: Chain, number: int, depths: list[int], rows: list[Row], pooled: list[TokenSums], evidence: Evidence
) -> xr.Dataset:
    sums = [row.sums[number] for row in rows]
    variables: dict[str, Any] = {
        "token_count": ("step", _stacked(sums, "token_count", depths[:1])[:, 0]),
        "sequence_count": ("step", np.array([float(row.sequences) for row in rows])),
    }
    if any(row.loss is not None for row in rows):
        variables["loss"] = ("step", np.array([math.nan if row.loss is None else row.loss for row in rows]))
    if any(row.scale is not None for row in rows):
        variables["loss_scale"] = (
            "step",
            np.array([math.nan if row.scale is None else row.scale for row in rows]),
        )
    variables |= _profiles(sums, depths)
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
    streaming = pooled[number].streaming
    if streaming is not None:
        found, labels = streamed_variables(streaming, depths)
        variables |= found
        coords |= labels
    if evidence.proofs:
        variables |= _gains(sums, evidence)
        coords |= connection_coords(chain.connections) | {"direction": DIRECTIONS}
    return xr.Dataset(variables, coords)


def _profiles(sums: list[TokenSums], depths: list[int]) -> dict[str, Any]:
    """What was added up at every depth in every step."""
    names = ("norm_sum", "square_norm_sum", "norm_max", "abs_max", "adjacent_cosine_sum")
    found: dict[str, Any] = {}
    for name in (*names, "gradient_square_norm_sum"):
        if any(s.array(name, depths) is not None for s in sums):
            found[name] = (schema.PROFILE, _stacked(sums, name, depths))
    if "gradient_square_norm_sum" in found:
        seen = {depth for s in sums for depth in s.sums.get("gradient_square_norm_sum", ())}
        found["gradient_square_norm_sum"] += (_without(depths, seen),)
    return found


def _stacked(sums: list[TokenSums], name: str, keys: list[int]) -> np.ndarray:
    arrays = [s.array(name, keys) for s in sums]
    known = [array for array in arrays if array is not None]
    return np.stack([np.full_like(known[0], np.nan) if array is None else array for array in arrays])


def _gains(sums: list[TokenSums], evidence: Evidence) -> dict[str, Any]:
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


def _counted(rows: list[Coverage]) -> dict[str, int]:
    expected = [row for row in rows if row.expected]
    return {
        "sites_expected": len(expected),
        "sites_fired": sum(row.fired >= row.expected for row in expected),
    }


def _coverage(rows: list[Coverage]) -> xr.Dataset:
    texts = ("name", "site", "module", "chain", "why")
    columns = {name: [asdict(row)[name] for row in rows] for name in asdict(rows[0])}
    return xr.Dataset(
        {
            f"place_{name}" if name == "name" else name: (
                "place",
                np.array(values, dtype=object if name in texts else np.int64),
            )
            for name, values in columns.items()
        }
    )


# --- the attributes ---


def _attributes(session: Session, sequences: list[Sequence], evidence: Evidence) -> dict[str, Any]:
    settings = session.options
    known = {
        "model": type(session.model).__name__,
        "family": session.structure.family,
        "n_streams": session.structure.num_streams,
        "layout": session.structure.layouts[0],
        "layouts": list(session.structure.layouts) if len(set(session.structure.layouts)) > 1 else None,
        "orientation": evidence.orientation,
        "reconstruction_error": max((e for e in evidence.errors if not math.isnan(e)), default=None),
        "reconstruction_tolerance": tolerance(session.observer.precision) if evidence.proofs else None,
        "dtype": str(session.observer.dtype).removeprefix("torch."),
        "autocast": str(session.observer.precision).removeprefix("torch.")
        if session.observer.precision != session.observer.dtype
        else None,
        "block": session.structure.chains[0].block_class,
        "num_blocks": len(session.structure.chains[0].blocks),
        "num_parameters": sum(p.numel() for p in session.model.parameters()),
        "seed": settings.seed,
        "data_digest": _digest(sequences),
        "weights_digest": _weights_digest(session),
        "sampling": {
            "max_sequences": settings.max_sequences,
            "seed": settings.seed,
            "sequences_seen": session.reservoir.total,
            "sequences_kept": len(sequences),
        },
        "software": software(),
        "changes_outside": changes_outside(session, sequences) or None,
        "forwards_skipped": session.skipped or None,
    }
    return {name: value for name, value in known.items() if value is not None}


def _weights_digest(session: Session) -> str | None:
    """Of the weights that the run was measured with; they may have been trained further since."""
    if weights_stamp(session.model) != session.reservoir.held_stamp:
        return None
    return weights_digest(session.model)


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
