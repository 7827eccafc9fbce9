"""On which runs are pages timed? Runs of any size, made of arrays by the package's own constructor: no model, no forward."""

from __future__ import annotations

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
    shape = (sequences, tokens)
    states = np.empty((layers + 1, *shape, streams, features))
    states[0] = rng.standard_normal((*shape, streams, features))
    logits = 0.1 * rng.standard_normal((layers, *shape, streams, streams)) + 4.0 * np.eye(streams)
    mixing = np.exp(logits)
    for _ in range(20):
        mixing /= mixing.sum(-2, keepdims=True)
        mixing /= mixing.sum(-1, keepdims=True)
    read = np.full((layers, *shape, streams), 1.0 / streams)
    write = rng.uniform(0.5, 1.0, (layers, *shape, streams))
    branch = 0.1 * rng.standard_normal((layers, *shape, features))
    for layer in range(layers):
        kept = states[layer] if streams == 1 else mixing[layer] @ states[layer]
        added = branch[layer][..., None, :] * (1.0 if streams == 1 else write[layer][..., None])
        states[layer + 1] = kept + added
    state = ("depth", "sample", "token", "stream", "feature")
    route = ("connection", "sample", "token")
    variables = {
        "residual": (state, states.astype(np.float32)),
        "gradient": (state, (1e-3 * rng.standard_normal(states.shape)).astype(np.float32)),
        "mask": (("sample", "token"), np.ones(shape, dtype=bool)),
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
        variables |= {
            "h_res": ((*route, "stream_out", "stream_in"), mixing.astype(np.float32)),
            "h_pre": ((*route, "stream"), read.astype(np.float32)),
            "h_post": ((*route, "stream"), write.astype(np.float32)),
            "branch_in": (
                (*route, "feature"),
                np.einsum("cbtn,cbtnd->cbtd", read, states[:-1]).astype(np.float32),
            ),
            "branch_out": ((*route, "feature"), branch.astype(np.float32)),
        }
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
