"""How fast and accurate is the exact CKA of every layer with every other? Compared with the packages that compute it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.analysis.comparison import Comparison, Step, Tool, on_all_pairs
from benchmarks.analysis.inputs import OFFSETS, walk
from depthscope.diagnostics.kernels import similarity

LARGE = "12 × 4096"


def own(states: np.ndarray, *, convert: Callable[[np.ndarray], Any], unbiased: bool = True) -> Step:
    return partial(similarity.cka_matrix, convert(states), unbiased=unbiased)


# --- peers ---


def ckatorch_base(states: np.ndarray) -> Step:
    from ckatorch import cka_base

    return partial(on_all_pairs, partial(cka_base, unbiased=True), torch.from_numpy(states))


def repsim(states: np.ndarray) -> Step:
    from repsim import cka

    return partial(cka, list(states), "linear", "song")


def torchlens(states: np.ndarray) -> Step:
    from torchlens.stats import cka

    return partial(on_all_pairs, cka, torch.from_numpy(states))


# --- the answer ---


def truth(states: np.ndarray, *, unbiased: bool) -> np.ndarray:
    """Linear CKA in float64 from full Gram matrices, as in the papers (Kornblith et al.; Song et al.)."""
    count = states.shape[1]
    grams = np.empty((len(states), count, count))
    for gram, state in zip(grams, states, strict=True):
        # Centred before the product: at an offset of 1e4 a centred Gram matrix would have lost eight digits.
        centred = state.astype(np.float64)
        centred -= centred.mean(0)
        np.matmul(centred, centred.T, out=gram)
        if unbiased:
            # The unbiased estimator leaves a token's product with itself out.
            np.fill_diagonal(gram, 0.0)
    # All HSIC sums as one product of (L, N²) with its transpose.
    flat = grams.reshape(len(states), -1)
    hsic = flat @ flat.T
    if unbiased:
        sums = grams.sum(1)
        # The two other terms of Song's Eq. 5, for diagonals of zero.
        hsic += np.outer(sums.sum(1), sums.sum(1)) / ((count - 1) * (count - 2)) - sums @ sums.T * 2 / (
            count - 2
        )
    size = np.sqrt(np.diagonal(hsic))
    return hsic / np.outer(size, size)


TOOLS = {
    "depthscope, numpy": Tool(partial(own, convert=np.asarray), "unbiased"),
    "depthscope, torch": Tool(partial(own, convert=torch.from_numpy), "unbiased"),
    "ckatorch cka_base": Tool(ckatorch_base, "unbiased", "ckatorch", (LARGE,)),
    "torchlens stats.cka": Tool(torchlens, "biased", "torchlens"),
    "repsim": Tool(repsim, "unbiased", "repsim", (LARGE,)),
}


def comparisons(quick: bool) -> dict[str, Comparison]:
    """CKA of all pairs of layers."""
    sizes = {"6 × 256": (6, 256)} if quick else {"12 × 512": (12, 512), LARGE: (12, 4096)}
    checked = (3, 128) if quick else (4, 512)
    comparison = Comparison(
        title="CKA of every layer with every other (layers × tokens, 1024 features)",
        tools=TOOLS,
        baseline="depthscope, numpy",
        sizes={name: partial(walk, *size) for name, size in sizes.items()},
        variants={f"offset {offset:g}": partial(walk, *checked, offset=offset) for offset in OFFSETS},
        truths={"unbiased": partial(truth, unbiased=True), "biased": partial(truth, unbiased=False)},
        note=NOTE.format(layers=checked[0], tokens=checked[1]),
    )
    return {"cka": comparison}


NOTE = """Errors are largest absolute differences over {layers} layers × {tokens} tokens, a walk over depth with a common
offset of so many times its spread. Functions of two matrices are called once for each pair; packages that take models and a
loader in place of matrices are left out. torchlens gives the biased estimator, and is compared with that.
repsim's `cka` does not divide its HSIC of Song by those of each layer with itself; its `hsic` is right."""
