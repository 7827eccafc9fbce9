"""What were the static mixing logits at the start? Read from an initial checkpoint, or from a fresh model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from torch import nn

from depthscope.diagnostics import schema
from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.checkpoints.safetensors_header import StoredTensor
from depthscope.probes.static.describe import describe_weights
from depthscope.probes.static.dialect import known_dialects
from depthscope.probes.static.recognition import Context, place_of, recognise
from depthscope.probes.static.weights import settings_of_module, weigh


class Logits(NamedTuple):
    """Static logits of one connection, rows are destinations, and how Sinkhorn makes a matrix of them (``how``)."""

    module: str
    layer: int
    branch: str
    values: np.ndarray
    how: Mapping[str, Any]


def initial_logits(initial: str | Path | nn.Module) -> xr.DataArray:
    """Static mixing logits of a checkpoint's or a model's mHC connections, for `diagnostics.with_replay`.

    ``initial``: what training began with: a checkpoint that `describe_weights` reads, or the model as it was built.
    Returns: Dims (connection, stream_out, stream_in), rows are destinations, with the coordinates
    ``connection_module``, ``connection_layer`` and ``branch``; its attributes give by how many rounds of Sinkhorn,
    ending on which side, they become matrices.
    Raises CheckpointError: Where it contains no mHC connection, or several kinds of them.
    """
    found = list(_of_module(initial) if isinstance(initial, nn.Module) else _of_checkpoint(initial))
    name = type(initial).__name__ if isinstance(initial, nn.Module) else f"'{initial}'"
    if not found:
        raise CheckpointError(
            f"{name} holds no static logits of mHC connections that are known; give them as an array (connection, "
            "stream_out, stream_in) to ds.with_replay"
        )
    # one array has one shape, and its attributes one Sinkhorn for all connections
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
    description = describe_weights(path)
    for one in description.connections:
        if one.logits is not None:
            yield Logits(one.module, one.layer, one.branch, one.logits, one.sinkhorn)


def _of_module(model: nn.Module) -> Iterator[Logits]:
    state = model.state_dict()
    modules = dict(model.named_modules())
    # Recognition looks at names and shapes only, so no file is needed.
    stored = {name: StoredTensor(name, tuple(value.shape), "", Path(), 0, 0) for name, value in state.items()}
    for found in recognise(stored, known_dialects(), Context()).connections:
        path = found.candidate.module
        values = {
            role: state[tensor.name].detach().double().cpu().numpy()
            for role, tensor in found.candidate.roles.items()
        }
        # a path that is only the stem of parameter names belongs to the model itself
        constants = settings_of_module(found.dialect, modules.get(path, model))
        weights = weigh(found, values, constants)
        if weights.logits is not None:
            place = place_of(path)
            yield Logits(path, place.layer, place.branch, weights.logits, weights.sinkhorn)
