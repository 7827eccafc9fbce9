"""On which runs are pages timed? Runs of any size, made of arrays by the package's own constructor: no model, no forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics import create_run


def made_run(
    *, layers: int, streams: int, sequences: int, tokens: int, features: int, seed: int
) -> xr.DataTree:
    """A run whose states follow x' = H_res x + h_post F exactly, F random; of one stream x' = x + F.

    ``layers, streams, sequences, tokens, features``: its sizes; each layer is one connection.
    ``seed``: of all draws.
    """
    rng = np.random.default_rng(seed)
    states, connections = _propagated(rng, layers, (sequences, tokens, streams, features))
    state = ("depth", "sample", "token", "stream", "feature")
    variables = {
        "residual": (state, states.astype(np.float32)),
        "gradient": (state, (1e-3 * rng.standard_normal(states.shape)).astype(np.float32)),
        "mask": (("sample", "token"), np.ones((sequences, tokens), dtype=bool)),
        "token_text": (
            ("sample", "token"),
            np.array([[f"w{t}" for t in range(tokens)]] * sequences, dtype=object),
        ),
    }
    coords = {
        "layer": ("depth", np.arange(-1, layers)),
        "module": ("depth", np.array(["embed", *(f"blocks.{n}" for n in range(layers))], dtype=object)),
        "site": ("depth", np.array(["embed"] + ["post"] * layers, dtype=object)),
    }
    if streams > 1:
        variables |= connections
        coords |= {
            "connection_layer": ("connection", np.arange(layers)),
            "connection_module": (
                "connection",
                np.array([f"blocks.{n}.connection" for n in range(layers)], dtype=object),
            ),
            "branch": ("connection", np.array(["block"] * layers, dtype=object)),
            "depth_in": ("connection", np.arange(layers)),
            "depth_out": ("connection", np.arange(1, layers + 1)),
        }
    attrs = {
        "model": f"made of {layers} layers",
        "family": "residual" if streams == 1 else "mhc",
        "n_streams": streams,
        "orientation": "not_applicable" if streams == 1 else "destination_source",
        "seed": seed,
    }
    return create_run(xr.Dataset(variables, coords), attrs=attrs)


def _propagated(
    rng: np.random.Generator, layers: int, shape: tuple[int, int, int, int]
) -> tuple[np.ndarray, dict[str, Any]]:
    """The states of a run, and the variables of the connections between them."""
    *batch, streams, features = shape
    states = np.empty((layers + 1, *shape))
    states[0] = rng.standard_normal(shape)
    logits = 0.1 * rng.standard_normal((layers, *batch, streams, streams)) + 4.0 * np.eye(streams)
    mixing = np.exp(logits)
    for _ in range(20):
        mixing /= mixing.sum(-2, keepdims=True)
        mixing /= mixing.sum(-1, keepdims=True)
    read = np.full((layers, *batch, streams), 1.0 / streams)
    write = rng.uniform(0.5, 1.0, (layers, *batch, streams))
    branch = 0.1 * rng.standard_normal((layers, *batch, features))
    for layer in range(layers):
        mixed = states[layer] if streams == 1 else mixing[layer] @ states[layer]
        states[layer + 1] = mixed + branch[layer][..., None, :] * (
            1.0 if streams == 1 else write[layer][..., None]
        )
    route = ("connection", "sample", "token")
    arrays = {
        "h_res": ((*route, "stream_out", "stream_in"), mixing),
        "h_pre": ((*route, "stream"), read),
        "h_post": ((*route, "stream"), write),
        "branch_in": ((*route, "feature"), np.einsum("cbtn,cbtnd->cbtd", read, states[:-1])),
        "branch_out": ((*route, "feature"), branch),
    }
    return states, {name: (dims, values.astype(np.float32)) for name, (dims, values) in arrays.items()}
