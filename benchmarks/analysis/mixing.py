"""How fast and accurate are kernels of many small matrices? Compared with LAPACK and plain loops of products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.analysis.comparison import Comparison, Step, Tool
from benchmarks.analysis.inputs import KINDS, mixing
from depthscope.diagnostics.kernels import mixing as kernel

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
    return compared
