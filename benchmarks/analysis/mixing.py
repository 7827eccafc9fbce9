"""How fast and accurate are kernels of many small matrices? Compared with LAPACK and plain loops of products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr

from benchmarks.analysis.comparison import Comparison, Step, Tool
from benchmarks.analysis.inputs import KINDS, mixing
from depthscope.diagnostics import analyze, create_run, schema
from depthscope.diagnostics.kernels import mixing as kernel

# In the order of the catalogue's reductions: median, p1, p99.
QUANTILES = (0.5, 0.01, 0.99)

# --- singular values ---


def own_values(matrices: np.ndarray, *, convert: Callable[[np.ndarray], Any]) -> Step:
    return partial(kernel.singular_values, convert(matrices))


def torch_values(matrices: np.ndarray) -> Step:
    return partial(torch.linalg.svdvals, torch.from_numpy(matrices))


def numpy_values(matrices: np.ndarray) -> Step:
    return partial(np.linalg.svd, matrices, compute_uv=False)


def true_values(matrices: np.ndarray) -> np.ndarray:
    """By LAPACK's gesvd; numpy and torch call gesdd, another algorithm."""
    import scipy.linalg

    return np.stack(
        [scipy.linalg.svd(matrix, compute_uv=False, lapack_driver="gesvd") for matrix in matrices]
    )


def of_largest(found: np.ndarray, truth: np.ndarray) -> float:
    """The largest error of a value, relative to the largest value of its matrix."""
    return float((np.abs(found - truth) / truth[:, :1]).max())


VALUES = {
    "depthscope, numpy": Tool(partial(own_values, convert=np.asarray)),
    "depthscope, torch": Tool(partial(own_values, convert=torch.from_numpy)),
    "torch svdvals": Tool(torch_values),
    "numpy svd": Tool(numpy_values),
}


def values_comparison(streams: int, quick: bool) -> Comparison:
    count = 2_000 if quick else 40_000
    return Comparison(
        title=f"Singular values of {count} matrices, n = {streams}",
        tools=VALUES,
        baseline="torch svdvals",
        sizes={kind: partial(mixing, kind, (count,), streams) for kind in KINDS},
        variants={kind: partial(mixing, kind, (1_000,), streams, seed=1) for kind in KINDS},
        truths={"": true_values},
        error=of_largest,
        note="Errors are relative to the largest value of the matrix, over 1000 matrices, against LAPACK's gesvd.",
    )


# --- products from the first connection on ---


def own_prefix(matrices: np.ndarray, *, convert: Callable[[np.ndarray], Any]) -> Step:
    return partial(kernel.prefix_composites, convert(matrices))


def matmul_prefix(matrices: np.ndarray, *, convert: Callable[[np.ndarray], Any]) -> Step:
    """One batched product for each connection (bmm, in torch's case)."""
    stack = convert(matrices)

    def step() -> Any:
        products = [stack[0]]
        for matrix in stack[1:]:
            products.append(matrix @ products[-1])
        return torch.stack(products) if isinstance(stack, torch.Tensor) else np.stack(products)

    return step


def true_prefix(matrices: np.ndarray) -> np.ndarray:
    # 80 bits on x86, eleven more than float64: its rounding is no part of the error.
    products = [matrices[0].astype(np.longdouble)]
    for matrix in matrices[1:]:
        products.append(np.einsum("tij,tjk->tik", matrix, products[-1]))
    return np.stack(products).astype(np.float64)


def of_each(found: np.ndarray, truth: np.ndarray) -> float:
    """The largest error of an entry, relative to the largest entry of its product."""
    return float((np.abs(found - truth) / np.abs(truth).max((-2, -1), keepdims=True)).max())


PREFIX = {
    "depthscope, numpy": Tool(partial(own_prefix, convert=np.asarray)),
    "depthscope, torch": Tool(partial(own_prefix, convert=torch.from_numpy)),
    "torch, a loop of bmm": Tool(partial(matmul_prefix, convert=torch.from_numpy)),
    "numpy, a loop of matmul": Tool(partial(matmul_prefix, convert=np.asarray)),
}

# --- products between any two connections, every reduction over tokens ---


def run_of(matrices: np.ndarray) -> xr.DataTree:
    """A run with these connections and states of one feature."""
    connections, tokens, streams, _ = matrices.shape
    depth = np.arange(connections + 1)
    names = np.array([f"blocks.{i}" for i in range(connections)], dtype=object)
    # pair_gain is a metric: it reads connections from a run, not from an array.
    trace = xr.Dataset(
        {
            "residual": (schema.STATE, np.ones((len(depth), 1, tokens, streams, 1), np.float32)),
            "mask": (("sample", "token"), np.ones((1, tokens), bool)),
            "h_res": (schema.TRACE["h_res"].dims, matrices[:, None]),
        },
        {
            "depth": depth,
            "layer": ("depth", depth - 1),
            "site": ("depth", np.array(["embed"] + ["post"] * connections, dtype=object)),
            "module": ("depth", np.array(["embed", *names], dtype=object)),
            "sample": [0],
            "token": np.arange(tokens),
            "stream": np.arange(streams),
            "connection": np.arange(connections),
            "connection_layer": ("connection", np.arange(connections)),
            "branch": ("connection", np.array(["both"] * connections, dtype=object)),
            "connection_module": ("connection", names),
            "depth_in": ("connection", depth[:-1]),
            "depth_out": ("connection", depth[1:]),
        },
    )
    return create_run(trace, attrs=ATTRIBUTES | {"n_streams": streams})


ATTRIBUTES: dict[str, Any] = {
    "model": "synthetic",
    "family": "hc",
    "orientation": "destination_source",
    "reconstruction_error": 0.0,
    "dtype": "float64",
    "seed": 0,
    "loss_reduction": "mean",
    "data_digest": "synthetic",
    "sampling": {"max_sequences": 1, "seed": 0},
    "software": {"numpy": np.__version__},
}


def own_pairs(matrices: np.ndarray) -> Step:
    """The catalogue's metric, from a run: (direction, first, last, reduction)."""
    run = run_of(matrices)

    def step() -> np.ndarray:
        found = analyze(run, metrics=["pair_gain"])["pair_gain"].squeeze("step")
        # Without a dim of reductions the table has maxima only.
        found = found if "reduction" in found.dims else found.expand_dims(reduction=["max"], axis=-1)
        order = [name for name in ("mean", "median", "p1", "p99", "max") if name in found["reduction"].values]
        ordered = found.transpose("direction", "connection", "other_connection", "reduction")
        return ordered.sel(reduction=order).values

    return step


def naive_pairs(matrices: np.ndarray) -> Step:
    """The same with torch: a bmm for each pair, then its gains and their quantiles over tokens."""
    stack = torch.from_numpy(matrices)

    def step() -> np.ndarray:
        # NaN where the second connection comes before the first: there is no product.
        table = torch.full((2, len(stack), len(stack), 5), torch.nan, dtype=torch.float64)
        for first, last, product in pairs_of(stack):
            gains = (product.sum(-1).abs().amax(-1), product.sum(-2).abs().amax(-1))
            for direction, gain in enumerate(gains):
                middle = torch.quantile(gain, gain.new_tensor(QUANTILES))
                table[direction, first, last] = torch.stack([gain.mean(), *middle, gain.amax()])
        return table.numpy()

    return step


def pairs_of(stack: Any) -> Iterator[tuple[int, int, Any]]:
    for first in range(len(stack)):
        product = stack[first]
        yield first, first, product
        # Each product from the one before it: n²/2 products and not n³/6.
        for last in range(first + 1, len(stack)):
            # Later connections are on the left.
            product = stack[last] @ product
            yield first, last, product


def true_pairs(matrices: np.ndarray) -> np.ndarray:
    table = np.full((2, len(matrices), len(matrices), 5), np.nan)
    for first, last, product in pairs_of(matrices):
        for direction, axis in enumerate((-1, -2)):
            gain = np.abs(product.sum(axis)).max(-1)
            table[direction, first, last] = [gain.mean(), *np.quantile(gain, QUANTILES), gain.max()]
    return table


def of_gain(found: np.ndarray, truth: np.ndarray) -> float:
    """The largest relative error; a table of maxima only is compared with the maxima, the last reduction."""
    reductions = truth[..., -found.shape[-1] :]
    # Both tables are NaN below the diagonal.
    return float(np.nanmax(np.abs(found / reductions - 1.0)))


PAIRS = {
    "depthscope, pair_gain of a run": Tool(own_pairs),
    "one prefix pass (depthscope, numpy)": Tool(partial(own_prefix, convert=np.asarray), answers=False),
    "torch, bmm and quantile": Tool(naive_pairs),
}


def comparisons(quick: bool) -> dict[str, Comparison]:
    """Singular values, products from the first connection on, products between any two."""
    depth, tokens = (12, 256) if quick else (60, 4096)
    size = f"{depth} × {tokens} of 4 × 4"
    compared = {f"singular values {n}": values_comparison(n, quick) for n in (2, 3, 4, 8)}
    compared["prefix"] = Comparison(
        title="Products from the first connection through each (connections × tokens)",
        tools=PREFIX,
        baseline="torch, a loop of bmm",
        sizes={f"{kind}, {size}": partial(mixing, kind, (depth, tokens), 4) for kind in KINDS[1:]},
        variants={kind: partial(mixing, kind, (depth, 64), 4, seed=1) for kind in KINDS},
        truths={"": true_prefix},
        error=of_each,
        note="Errors are relative to the largest entry of the product, against long double, over 64 tokens.",
    )
    compared["all pairs"] = Comparison(
        title="Gains of the products between any two connections, reduced over tokens",
        tools=PAIRS,
        baseline="one prefix pass (depthscope, numpy)",
        sizes={f"{kind}, {size}": partial(mixing, kind, (depth, tokens), 4) for kind in KINDS[1:]},
        variants={kind: partial(mixing, kind, (12, 64), 4, seed=1) for kind in KINDS},
        truths={"": true_pairs},
        error=of_gain,
        note=PAIRS_NOTE,
    )
    return compared


PAIRS_NOTE = """The metric's time includes reading the connections from the run and labelling the table: forward and
backward gains of every pair, with mean, median, p1, p99 and max over tokens. Errors are relative, over 12 connections and
64 tokens. The prefix pass computes something else, and is here to be divided by."""
