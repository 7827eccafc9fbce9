"""How do the Amax gains of Fig. 3 and 7 of the mHC paper grow? On built networks, for which there are closed forms.

The weights measured in the paper are not public: these are the same curves of other networks, each with its own number,
and the printed order of magnitude.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.published.row import Row
from depthscope.diagnostics.kernels import mixing

# Shapes: C connections, T tokens, N streams.

STREAMS, CONNECTIONS, TOKENS = 4, 60, 1024
HC_ORDER, MHC_ORDER = 3000.0, 1.6  # about: the largest composite gains of the 27B models of the paper
DRIFT = HC_ORDER ** (1 / CONNECTIONS)
HC_SPREADS = (0.05, 0.03)  # standard deviations of the weights, attention and MLP
LARGEST_OF_FOUR = 1.029  # expected largest of four standard normal numbers
MHC_DIAGONAL, MHC_SPREAD = (
    12.0,
    4.0,
)  # near the identity; a range for which twenty Sinkhorn steps do not converge
BRANCHES = ("attention", "MLP")
MARKS = (1, 20, 40, 60)
DIRECTIONS = {"forward": mixing.forward_gain, "backward": mixing.backward_gain}


def free_connections(seed: int = 0) -> np.ndarray:
    """HC's mixing (C, T, N, N): noise about a matrix whose rows and columns sum to 3000^(1/60) = 1.143."""
    # Attention and MLP connections alternate.
    spread = np.resize(HC_SPREADS, CONNECTIONS)[:, None, None, None]
    noise = np.random.default_rng(seed).standard_normal((CONNECTIONS, TOKENS, STREAMS, STREAMS))
    return np.eye(STREAMS) + (DRIFT - 1) / STREAMS + spread * noise


def constrained_connections(seed: int = 0) -> np.ndarray:
    """Mixing of mHC (C, T, N, N): twenty Sinkhorn steps, rows last, from logits of a large range."""
    rng = np.random.default_rng(seed)
    # As in the paper: a learned part, and a smaller one that depends on the token.
    static = rng.standard_normal((CONNECTIONS, 1, STREAMS, STREAMS))
    dynamic = 0.1 * rng.standard_normal((CONNECTIONS, TOKENS, STREAMS, STREAMS))
    return mixing.sinkhorn(MHC_DIAGONAL * np.eye(STREAMS) + MHC_SPREAD * (static + dynamic))


def gains_of_free_mixing() -> Iterator[Row]:
    """mHC Fig. 3: Amax gains of 60 built HC connections that drift to the printed order (27B weights are not public)."""
    h = free_connections()
    for start, (branch, spread) in enumerate(zip(BRANCHES, HC_SPREADS, strict=True)):
        # A row sum is normal with mean DRIFT and deviation spread · √n; the gain is the largest of n of them.
        expected = DRIFT + LARGEST_OF_FOUR * spread * STREAMS**0.5
        for direction, gain in DIRECTIONS.items():
            found = gain(h[start::2]).mean()
            yield Row(f"one connection, {branch}, {direction}: closed form", expected, found, 0.01)
    products = mixing.prefix_composites(h)
    total = products[-1].sum(-1).mean()
    yield Row("mean row sum of the product of 60: closed form", HC_ORDER, total, 0.1 * HC_ORDER)
    yield from along_depth(products, HC_ORDER)


def gains_of_constrained_mixing() -> Iterator[Row]:
    """mHC Fig. 7: Amax gains of mHC, on 60 built connections near the identity (27B weights are not public)."""
    h = constrained_connections()
    for start, branch in enumerate(BRANCHES):
        forward, backward = (gain(h[start::2]).mean() for gain in DIRECTIONS.values())
        yield Row(f"one connection, {branch}, forward: rows are normalised last", 1.0, forward, 1e-9)
        yield Row(f"one connection, {branch}, backward", None, backward)
    products = mixing.prefix_composites(h)
    yield Row("mean column sum of the product of 60: closed form", 1.0, products[-1].sum(-2).mean(), 1e-9)
    yield from along_depth(products, MHC_ORDER)


def along_depth(products: np.ndarray, order: float) -> Iterator[Row]:
    """The composite gain, mean over tokens, at some depths; the largest one with that of the paper's model."""
    for direction, gain in DIRECTIONS.items():
        curve = gain(products).mean(-1)
        for mark in MARKS:
            yield Row(f"product of {mark}, {direction}", None, curve[mark - 1])
        yield Row(
            f"largest product, {direction} (in brackets: 27B model)", None, curve.max(), elsewhere=order
        )
