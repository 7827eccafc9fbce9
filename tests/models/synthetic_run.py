"""Synthetic runs that follow the contract: small, exact, without torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics import schema


def doubly_stochastic(rng: np.random.Generator, shape: tuple[int, ...], strength: float) -> np.ndarray:
    """Matrices by Sinkhorn of random logits around a diagonal of 3."""
    logits = strength * rng.standard_normal(shape) + 3.0 * np.eye(shape[-1])
    matrix = np.exp(logits)
    for _ in range(50):  # more than the models' 20 rounds, so that both sums are 1 to rounding
        matrix /= matrix.sum(-2, keepdims=True)
        matrix /= matrix.sum(-1, keepdims=True)
    return matrix


def synthetic_run(
    family: str = "residual",
    *,
    layers: int = 6,
    samples: int = 2,
    tokens: int = 16,
    features: int = 32,
    streams: int = 4,
    seed: int = 0,
    gradients: bool = True,
    weights: bool = True,
    **statements: str,
) -> xr.DataTree:
    """Build a run whose states really follow x' = H_res x + h_post F for random branches F.

    ``statements`` are attributes such as ``proof`` and ``constraint``, which a run of an earlier version lacks.
    """
    rng = np.random.default_rng(seed)
    n = 1 if family == "residual" else streams
    per_layer = (
        1 if n == 1 else 2
    )  # a plain block shows one state, a connection stands before attention and before the MLP
    states, parts = _forward(rng, family, per_layer * layers, (samples, tokens, n, features))
    mask = np.ones((samples, tokens), dtype=bool)
    mask[-1, : tokens // 4] = False  # padding on the left, of one sequence only
    variables = {
        "residual": (schema.STATE, states.astype(np.float32)),
        "mask": (("sample", "token"), mask),
    }
    if gradients:
        values = 1e-3 * rng.standard_normal(states.shape)
        variables["gradient"] = (schema.STATE, values.astype(np.float32))
    variables |= _attention(rng, states.shape[0], (samples, 3, tokens))
    coords = _state_coords(layers, per_layer) | {
        "sample": np.arange(samples),
        "token": np.arange(tokens),
        "stream": np.arange(n),
    }
    if n > 1:
        for name, values in parts.items():
            variables[name] = (schema.TRACE[name].dims, values.astype(np.float32))
        coords |= _connection_coords(layers)
    attrs = {
        "model": f"synthetic-{family}",
        "family": family,
        "n_streams": n,
        "orientation": "not_applicable" if n == 1 else "destination_source",
        "reconstruction_error": None if n == 1 else 1e-7,
        "dtype": "float32",
        "seed": seed,
        "loss_reduction": "mean",
        "data_digest": "synthetic",
        "sampling": {"max_sequences": samples, "seed": seed},
        "software": {"numpy": np.__version__},
        **statements,
    }
    statistics = _weight_statistics(rng, layers, int(mask.sum())) if weights else None
    return schema.create_run(xr.Dataset(variables, coords), statistics=statistics, attrs=attrs)


def _attention(rng: np.random.Generator, depths: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Causal attention of random logits before every state but the embedding, as three numbers per query."""
    samples, heads, tokens = shape
    logits = 2.0 * rng.standard_normal((depths, samples, heads, tokens, tokens))
    seen = np.tri(tokens, dtype=bool)
    weights = np.where(seen, np.exp(logits), 0.0)
    weights /= weights.sum(-1, keepdims=True)
    entropy = -np.sum(weights * np.log(np.where(weights > 0, weights, 1.0)), axis=-1)
    numbers = entropy, np.broadcast_to(seen.sum(-1), entropy.shape), weights[..., 0]
    found = {}
    for name, values in zip(schema.OF_ATTENTION, numbers, strict=True):
        of_one = values.astype(np.float32)
        of_one[0] = np.nan
        found[name] = (schema.QUERY, of_one)
    return found


def _forward(
    rng: np.random.Generator, family: str, sublayers: int, shape: tuple[int, ...]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The states of every depth (depth, *shape) in float64, and the connections' variables by name."""
    samples, tokens, n, features = shape
    # Streams begin as copies of one embedding, as in the models.
    x = np.repeat(rng.standard_normal((samples, tokens, 1, features)), n, axis=2)
    states, parts = [x], {"h_res": [], "h_pre": [], "h_post": [], "branch_in": [], "branch_out": []}
    for _ in range(sublayers):
        h_res, h_pre, h_post = _weights(rng, family, (samples, tokens, n))
        branch_in = np.einsum("btn,btnd->btd", h_pre, x)
        branch_out = rng.standard_normal((samples, tokens, features))
        x = np.einsum("btij,btjd->btid", h_res, x) + h_post[..., None] * branch_out[:, :, None]
        for name, value in zip(parts, (h_res, h_pre, h_post, branch_in, branch_out), strict=True):
            parts[name].append(value)
        states.append(x)
    return np.stack(states), {name: np.stack(values) for name, values in parts.items()}


def _weights(
    rng: np.random.Generator, family: str, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """H_res, H_pre and H_post of one connection for every token; a plain residual has 1 for each of the first."""
    n = shape[-1]
    h_res = np.broadcast_to(np.eye(n), (*shape, n)).copy()
    if family == "mhc":
        h_res = doubly_stochastic(rng, h_res.shape, 0.3)
    elif family == "hc":
        h_res = h_res + 0.05 * rng.standard_normal(h_res.shape)
    # The noise keeps streams from staying copies of one another; a single stream has no use for it.
    h_pre = np.full(shape, 1.0 / n) + (0.05 * rng.standard_normal(shape) if n > 1 else 0)
    h_post = np.ones(shape) + (0.1 * rng.standard_normal(shape) if n > 1 else 0)
    return h_res, h_pre, h_post


def _state_coords(layers: int, per_layer: int) -> dict[str, Any]:
    """Coordinates of the depth axis: the embedding, then one state after every sublayer."""
    sublayers = np.arange(per_layer * layers)
    site = ["embed"] + ["post" if per_layer == 1 or i % 2 else "mid" for i in sublayers]
    module = ["embed"] + [f"blocks.{i // per_layer}" for i in sublayers]
    return {
        "depth": np.arange(len(sublayers) + 1),
        "layer": ("depth", np.array([-1, *(sublayers // per_layer)])),
        "site": ("depth", np.array(site, dtype=object)),
        "module": ("depth", np.array(module, dtype=object)),
    }


def _connection_coords(layers: int) -> dict[str, Any]:
    """Coordinates of the connection axis: two connections a layer, each between two neighbouring depths."""
    number = np.arange(2 * layers)
    return {
        "connection": number,
        "connection_layer": ("connection", number // 2),
        "branch": ("connection", np.array(["attn", "mlp"] * layers, dtype=object)),
        "connection_module": ("connection", np.array([f"blocks.{i // 2}" for i in number], dtype=object)),
        "depth_in": ("connection", number),
        "depth_out": ("connection", number + 1),
    }


def _weight_statistics(rng: np.random.Generator, layers: int, tokens: int) -> xr.Dataset:
    """One step of an optimizer on an embedding and one weight a block."""
    layer = np.arange(-1, layers)
    count = np.full(len(layer), 1000.0)
    square = count * rng.uniform(0.5, 2.0, len(layer))
    variables = {
        "token_count": ("step", [float(tokens)]),
        "weight_square_norm": (schema.MOTION, square[None]),
        "weight_gradient_square_norm": (schema.MOTION, 1e-4 * rng.uniform(0.5, 2.0, (1, len(layer)))),
        "weight_update_square_norm": (
            schema.MOTION,
            1e-6 * square[None] * rng.uniform(0.5, 2.0, (1, len(layer))),
        ),
        "weight_first_square_distance": (schema.MOTION, 0.1 * square[None]),
        "weight_first_square_norm": (schema.MOTION, 0.9 * square[None]),
        "weight_count": ("weight", count),
    }
    paths = np.array(["embed", *(f"blocks.{i}.linear" for i in range(layers))], dtype=object)
    coords = {"step": [0], "weight": paths, "weight_layer": ("weight", layer)}
    return xr.Dataset(variables, coords)
