"""What were the static mixing logits at the start? Read from an initial checkpoint, or from a fresh model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from torch import nn

from depthscope.diagnostics import schema
from depthscope.probes.checkpoints.tensor_inventory import StoredTensor
from depthscope.probes.checkpoints.weight_files import CheckpointError
from depthscope.probes.static.describe import describe_weights
from depthscope.probes.static.families import Family, find_connections, place_of
from depthscope.probes.static.formulas import SINKHORN_ROUNDS, weigh


class Logits(NamedTuple):
    """Static logits of one connection, rows are destinations, and how the model makes a matrix of them."""

    module: str
    layer: int
    branch: str
    values: np.ndarray
    how: Mapping[str, Any]


def initial_logits(initial: str | Path | nn.Module) -> xr.DataArray:
    """Static mixing logits of a checkpoint's or a model's mHC connections, for `diagnostics.with_replay`.

    Parameters
    ----------
    initial : str, Path or Module
        What training began with: a checkpoint that `describe_weights` reads, or the model as it was built.

    Returns
    -------
    DataArray
        Dims (connection, stream_out, stream_in), rows are destinations, with the coordinates ``connection_module``,
        ``connection_layer`` and ``branch``; its attributes say by how many rounds of Sinkhorn, ending on which side,
        they become matrices.

    Raises
    ------
    CheckpointError
        Where it holds no mHC connection, or several kinds of them.
    """
    found = list(_of_module(initial) if isinstance(initial, nn.Module) else _of_checkpoint(initial))
    name = type(initial).__name__ if isinstance(initial, nn.Module) else f"'{initial}'"
    if not found:
        raise CheckpointError(
            f"{name} holds no static logits of mHC connections that are known; give them as an array (connection, "
            "stream_out, stream_in) to diagnostics.with_replay"
        )
    kinds = {(each.values.shape, *each.how.items()) for each in found}
    if len(kinds) > 1:
        raise CheckpointError(
            f"{name} holds {len(kinds)} kinds of mHC connections; expected one number of streams and one Sinkhorn: give "
            "the logits of one chain as an array"
        )
    coords = {
        "connection_module": np.array([each.module for each in found], dtype=object),
        "connection_layer": np.array([each.layer for each in found]),
        "branch": np.array([each.branch for each in found], dtype=object),
    }
    return xr.DataArray(
        np.stack([each.values for each in found]),
        dims=schema.TRACE["initial_logits"].dims,
        coords={name: ("connection", values) for name, values in coords.items()},
        attrs=dict(found[0].how),
    )


def _of_checkpoint(path: str | Path) -> Iterator[Logits]:
    told = describe_weights(path)
    for one in told.connections:
        if one.logits is not None:
            yield Logits(one.module, one.layer, one.branch, one.logits, _how(one.style, told.settings))


def _of_module(model: nn.Module) -> Iterator[Logits]:
    state = model.state_dict()
    stored = {name: StoredTensor(name, tuple(value.shape), "", Path(), 0, 0) for name, value in state.items()}
    for family, found in find_connections(stored):
        if not family.constrained:
            continue
        values = {
            role: state[tensor.name].detach().double().cpu().numpy() for role, tensor in found.roles.items()
        }
        settings = _settings(family, model, found.module)
        weights = weigh(
            family.name, family.style, n=found.streams, f=found.fractions, values=values, settings=settings
        )
        if "res" in weights.biases:
            place = place_of(found.module)
            yield Logits(
                found.module, place.layer, place.branch, weights.biases["res"], _how(family.style, settings)
            )


def _settings(family: Family, model: nn.Module, path: str) -> dict[str, float]:
    """What the module itself keeps of the family's settings, and the defaults of the rest."""
    module = dict(model.named_modules()).get(path, model)
    constraint = getattr(module, "residual_mix_constraint_fn", None)
    rounds = getattr(constraint, "keywords", {}).get("iters", SINKHORN_ROUNDS)
    own = {name: float(getattr(module, name, value)) for name, value in family.settings.items()}
    return {"rounds": float(rounds)} | own


def _how(style: str, settings: Mapping[str, float]) -> dict[str, Any]:
    """Rounds, the exact side in the canonical orientation, and the floor, as `depthscope.probes.static.formulas` has them."""
    if style == "returned":
        rounds = int(settings["hc_sinkhorn_iters"])
        return {"sinkhorn_steps": rounds, "last": "row", "floor": settings["hc_eps"]}
    return {"sinkhorn_steps": int(settings.get("rounds", SINKHORN_ROUNDS)), "last": "column", "floor": 0.0}
