"""Which published numbers are reproduced? One function for each result, its docstring the title of its table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.published.figure_8 import matrices, order_errors
from depthscope.diagnostics.kernels import mixing, rank, similarity

LAYERS = 8
# About: the largest composite gains of the 27B models of the paper, of its Fig. 3 and 7.
LARGEST_GAINS = {"HC": 3000.0, "mHC": 1.6}
DIRECTIONS = {"forward": mixing.forward_gain, "backward": mixing.backward_gain}
TINY = 1e-30  # below this, exp(s) − 1 is s to the last bit


@dataclass(frozen=True)
class Row:
    """A published number, and the same number as computed here.

    ``name``: what the number is.
    ``printed``: in the paper, or in closed form; None where neither gives it.
    ``found``: as computed here.
    ``tolerance``: largest difference allowed; a number printed with two decimals has an error of 0.005.
    ``elsewhere``: the number that a paper prints for a model that is not public: of the same curve, of another model.
    """

    name: str
    printed: float | None
    found: float
    tolerance: float = 0.0
    elsewhere: float | None = None

    @property
    def agrees(self) -> bool:
        # A number of another model, `elsewhere`, is shown and never compared.
        return self.printed is None or bool(abs(self.printed - self.found) <= self.tolerance)


def order_of_products() -> Iterator[Row]:
    """mHC Fig. 8: later layers are on the left (arXiv 2512.24880); printed to 0.01, which changes HC by 3 %."""
    for family in ("HC", "mHC"):
        # Printed to two decimals, a product of two of them has errors of a few 0.01.
        error, turned = order_errors(family)
        yield Row(f"{family}: P31-60 P1-30 against P1-60, worst entry, share of largest", 0.0, error, 0.03)
        yield Row(
            f"{family}: the reversed order misses by more (1 = yes)", 1.0, float(turned > 3 * error), 0.0
        )


def truncated_sinkhorn() -> Iterator[Row]:
    """mHC Fig. 8: stopping Sinkhorn early breaks the column sums and non-expansiveness."""
    late = matrices("mHC")["P31-60"]
    columns = late.sum(0)
    yield Row("smallest backward sum of P31-60", 0.41, columns.min(), 0.02)
    yield Row("largest backward sum of P31-60", 1.50, mixing.backward_gain(late), 0.02)
    yield Row("spectral norm of P31-60", 1.14, mixing.operator_gain(late, 2), 0.02)


def gains_of_printed_matrices() -> Iterator[Row]:
    """mHC Fig. 3 and 7: Amax gains of the learned matrices that are printed, those of Fig. 8 (means over tokens)."""
    for family, order in LARGEST_GAINS.items():
        part = matrices(family)
        for direction, gain in DIRECTIONS.items():
            single = max(gain(part[name]) for name in ("H1", "H30", "H60"))
            product = max(gain(part[name]) for name in ("P1-30", "P31-60", "P1-60"))
            yield Row(f"{family}: largest of three connections, {direction}", None, single)
            yield Row(
                f"{family}: largest of three products, {direction} (in brackets: the full curve)",
                None,
                product,
                elsewhere=order,
            )


def rank_collapse() -> Iterator[Row]:
    """Attention without skips loses rank doubly exponentially, skips prevent it (Dong et al. 2103.03404)."""
    logs = log_residuals(skip=False)
    for layer in (1, 2, 4):
        ratio = logs[layer] / logs[layer - 1]
        yield Row(f"without skips, on the way: log r[{layer}] / log r[{layer - 1}]", None, ratio)
    yield Row(
        f"without skips, the limit: log r[{LAYERS}] / log r[{LAYERS - 1}]", 3.0, logs[-1] / logs[-2], 0.003
    )
    logs = log_residuals(skip=True)
    yield Row(
        "with skips: share of the residual left after as many layers", 1.0, np.exp(logs[-1] - logs[0]), 0.05
    )


def log_residuals(*, skip: bool, seed: int = 0) -> np.ndarray:
    """Logarithms of √(‖R‖₁ ‖R‖_∞) of tokens through layers of self-attention, without and after each.

    The mean over tokens is removed after each layer and the size is stored as a logarithm, so that the residual is
    followed far below the smallest float64. The softmax is exact: without its uniform part, which maps centred tokens
    to zero, it is (e − mean e)/(N + Σe) with e = exp(score) − 1; for tiny scores e is the score itself.
    """
    rng = np.random.default_rng(seed)
    tokens, width = 12, 32
    # A fixed query-key product; what counts is that scores are quadratic in x.
    scoring = rng.standard_normal((width, width)) / np.sqrt(width)
    x = rng.standard_normal((tokens, width))
    x = 1e-2 * (x - x.mean(0)) / np.abs(x).sum(-1).max()
    logs = [np.log(_residual(x))]
    x /= _residual(x)
    for _ in range(LAYERS):
        square = np.exp(2 * logs[-1])
        scores = x @ scoring @ x.T
        # expm1 keeps the digits of exp(s) − 1 for small s.
        raised = np.expm1(square * scores) / square if square > TINY else scores
        weights = (raised - raised.mean(-1, keepdims=True)) / (
            tokens + square * raised.sum(-1, keepdims=True)
        )
        # With a skip the branch is added at its own size; without, its size goes into the logarithm.
        x = x + square * weights @ x if skip else weights @ x
        x = x - x.mean(0)
        logs.append(logs[-1] + (0 if skip else 2 * logs[-1]) + np.log(_residual(x)))
        x /= _residual(x)
    return np.array(logs)


def _residual(x: np.ndarray) -> float:
    """√(‖R‖₁ ‖R‖_∞) of rows without a mean."""
    size = np.abs(x)
    return float(np.sqrt(size.sum(0).max() * size.sum(1).max()))


def pre_norm_growth() -> Iterator[Row]:
    """A pre-LN stack of independent unit branches: ‖h_l‖² = l, cos(h_l, h_l+1) = √(l/(l+1))."""
    rng = np.random.default_rng(0)
    branches = rng.standard_normal((33, 200, 512))
    branches /= np.linalg.norm(branches, axis=-1, keepdims=True)
    h = np.cumsum(branches, axis=0)
    for terms in (2, 8, 32):
        here, following = h[terms - 1], h[terms]
        sizes = np.linalg.norm(here, axis=-1), np.linalg.norm(following, axis=-1)
        cosine = (here * following).sum(-1) / sizes[0] / sizes[1]
        yield Row(f"squared norm of {terms} terms", float(terms), (sizes[0] ** 2).mean(), 0.02 * terms)
        yield Row(
            f"cosine of {terms} and {terms + 1} terms", (terms / (terms + 1)) ** 0.5, cosine.mean(), 0.01
        )


def cka_of_noise() -> Iterator[Row]:
    """Biased CKA of independent data is near 1 for few tokens (Kornblith et al. 1905.00414; Song et al. 2012)."""
    rng = np.random.default_rng(0)
    # Ten times as many features as tokens: there biased CKA is high for independent data.
    x, y = rng.standard_normal((2, 100, 1000))
    yield Row("biased CKA, N = 100, d = 1000", 0.91, similarity.linear_cka(x, y), 0.01)
    yield Row("its null in closed form", 0.91, similarity.cka_null(100, 1000), 0.01)
    yield Row("unbiased CKA of the same data", 0.0, similarity.linear_cka(x, y, unbiased=True), 0.02)


def ranks_of_noise() -> Iterator[Row]:
    """Ranks of iid entries against the law of Marchenko and Pastur, N = 2000, d = 500."""
    n, d = 2000, 500
    x = np.random.default_rng(0).standard_normal((n, d))
    law = rank.marchenko_pastur(n, d)
    s = rank.singular_values(x)
    closed = {
        "entropy_rank": d * np.exp(-d / n / 2),
        "participation_ratio": d / (1 + d / n),
        "stable_rank": d / (1 + (d / n) ** 0.5) ** 2,
        "effective_rank": law.effective_rank,
    }
    for name, expected in closed.items():
        found = getattr(rank, f"{name}_of")(s)
        yield Row(name.replace("_", " "), expected, found, 0.02 * expected)


def traffic(n: int, d: int) -> tuple[int, int]:
    """Elements read and written per token by the residual connection of one sublayer (n = 1: a plain one)."""
    if n == 1:
        return 2 * d, d
    # (read, written) of each step of Table 2.
    mappings = d * n, n * n + 2 * n
    read_branch, write_branch = (n * d + n, d), (d + n, n * d)
    mix, merge = (n * d + n * n, n * d), (2 * n * d, n * d)
    steps = (mappings, read_branch, write_branch, mix, merge)
    return sum(step[0] for step in steps), sum(step[1] for step in steps)


def memory_traffic() -> Iterator[Row]:
    """mHC Table 2: elements moved per token and sublayer, step by step against the printed totals."""
    d = 4096
    reads, writes = traffic(1, d)
    yield Row("residual: reads 2d", 2 * d, reads, 0)
    yield Row("residual: writes d", d, writes, 0)
    for n in (2, 4):
        reads, writes = traffic(n, d)
        yield Row(f"HC n = {n}: reads (5n+1)d + n² + 2n", (5 * n + 1) * d + n * n + 2 * n, reads, 0)
        yield Row(f"HC n = {n}: writes (3n+1)d + n² + 2n", (3 * n + 1) * d + n * n + 2 * n, writes, 0)


RESULTS = (
    order_of_products,
    truncated_sinkhorn,
    gains_of_printed_matrices,
    rank_collapse,
    pre_norm_growth,
    cka_of_noise,
    ranks_of_noise,
    memory_traffic,
)
