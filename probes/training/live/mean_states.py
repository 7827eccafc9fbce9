"""How many directions do the sampled tokens use, and which depths are alike? In the mean over streams, from shared products.

The numbers are those of `metrics.collapse` and `metrics.similarity` for pooled tokens, which a test compares; here
all depths are computed at once and without labels, since an analysis of every step would cost as much as the step.
Shapes: L depth, K token, D feature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from depthscope.diagnostics.kernels import rank
from depthscope.diagnostics.kernels import similarity as kernel
from depthscope.diagnostics.kernels.rank.participation import corrected_ratio
from depthscope.diagnostics.kernels.rank.spectrum import GRAM_LIMIT
from depthscope.diagnostics.metrics.collapse import FEWEST_ROWS, RESOLVED_SHARE
from depthscope.probes.statistics.compiled_sample import unit_tokens

Tables = dict[str, tuple[tuple[str, ...], np.ndarray]]

RANKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "effective_rank": rank.effective_rank_of,
    "entropy_rank": rank.entropy_rank_of,
    "participation_ratio": rank.participation_ratio_of,
    "stable_rank": rank.stable_rank_of,
}
RANK_DIMS = ("scope", "tokens", "centering", "depth")


def mean_state_metrics(states_LKD: np.ndarray, ordinary_K: np.ndarray) -> Tables:
    """Ranks, CKA, angles and block influence of the sampled tokens, all of them and those without massive activations."""
    every = _of_tokens(states_LKD)
    ordinary = every if ordinary_K.all() else _of_tokens(states_LKD[:, ordinary_K])
    found = _rank_tables(states_LKD, ordinary_K, every, ordinary)
    tables = np.stack([every["cka"], ordinary["cka"]])
    adjacent = np.full(tables.shape[:-1], np.nan)
    adjacent[:, 1:] = np.diagonal(tables, offset=-1, axis1=-2, axis2=-1)
    found["cka"] = (("estimator", "tokens", "depth", "other_depth"), tables[None])
    found["adjacent_cka"] = (("estimator", "tokens", "depth"), adjacent[None])
    angles = np.stack([every["angular_distance"], ordinary["angular_distance"]])
    found["angular_distance"] = (("tokens", "depth", "other_depth"), angles)
    influences = np.stack([every["block_influence"], ordinary["block_influence"]])
    found["block_influence"] = (("tokens", "depth"), influences)
    return found


def rank_metrics(states_LKD: np.ndarray, ordinary_K: np.ndarray) -> Tables:
    """The ranks of `mean_state_metrics` alone, such as those of a single stream; same parameters."""
    every = _of_tokens(states_LKD, ranks_only=True)
    ordinary = every if ordinary_K.all() else _of_tokens(states_LKD[:, ordinary_K], ranks_only=True)
    return _rank_tables(states_LKD, ordinary_K, every, ordinary)


def _rank_tables(
    states_LKD: np.ndarray,
    ordinary_K: np.ndarray,
    every: dict[str, np.ndarray],
    ordinary: dict[str, np.ndarray],
) -> Tables:
    """Ranks of all tokens and of the ordinary ones, and of how many tokens each is."""
    found: Tables = {
        name: (RANK_DIMS, np.stack([every[name], ordinary[name]])[None])
        for name in (*RANKS, "corrected_participation_ratio")
    }
    counts = np.array([[states_LKD.shape[1], ordinary_K.sum()]], dtype=float)
    repeated = np.repeat(np.where(counts > 0, counts, np.nan)[..., None], len(states_LKD), axis=-1)
    found["num_tokens"] = (("scope", "tokens", "depth"), repeated)
    return found


class _Products(NamedTuple):
    """Products of every two tokens of a depth, (L, K, K) in float64: of the states, and of these less their mean."""

    raw: np.ndarray
    centered: np.ndarray

    @classmethod
    def of(cls, states_LKD: np.ndarray) -> _Products:
        """One product for both: centred first, which is exact under any common offset, and the mean put back."""
        centered = states_LKD.astype(np.float64)
        mean = centered.mean(axis=1, keepdims=True)
        centered -= mean
        products = centered @ centered.swapaxes(1, 2)
        along = centered @ mean.swapaxes(1, 2)  # (L, K, 1)
        square = mean @ mean.swapaxes(1, 2)
        return cls(products + along + along.swapaxes(1, 2) + square, products)


def _of_tokens(states_LKD: np.ndarray, *, ranks_only: bool = False) -> dict[str, np.ndarray]:
    """Numbers of some tokens; NaN at depths that are not finite, and where there are too few tokens."""
    depths, count, _ = states_LKD.shape
    if not count:
        empty = np.full((depths, depths), np.nan)
        ranks = dict.fromkeys((*RANKS, "corrected_participation_ratio"), np.full((2, depths), np.nan))
        return ranks | (
            {} if ranks_only else {"cka": empty, "angular_distance": empty, "block_influence": empty[0]}
        )
    finite = np.isfinite(states_LKD).all(axis=(1, 2))
    if not finite.all():  # kernels refuse what is not finite
        states_LKD = np.where(finite[:, None, None], states_LKD, np.float32(0.0))
    products = _Products.of(states_LKD)
    found = _ranks(states_LKD, products)
    if not ranks_only:
        found["cka"] = _cka(products.centered)
        found["angular_distance"], found["block_influence"] = _angles(states_LKD)
    broken = ~finite
    for name, values in found.items():
        values[..., broken] = np.nan
        if name in ("cka", "angular_distance"):
            values[broken] = np.nan
    if not ranks_only:
        found["block_influence"][1:][broken[:-1]] = np.nan
    return found


def _ranks(states_LKD: np.ndarray, products: _Products) -> dict[str, np.ndarray]:
    """Ranks by centring and depth, (2, L)."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*RANKS, "corrected_participation_ratio")}
    count = np.full(len(states_LKD), float(states_LKD.shape[1]))
    for center, of_tokens in zip((False, True), products, strict=True):
        spectra = _singular_values(states_LKD, of_tokens, center=center)
        for name, measure in RANKS.items():
            found[name].append(measure(spectra))
        diagonal = (np.diagonal(of_tokens, axis1=1, axis2=2) ** 2).sum(axis=1)
        energy = spectra**2
        square = (energy**2).sum(axis=-1)
        corrected = corrected_ratio(energy.sum(axis=-1) ** 2, square, diagonal, count, center=center)
        known = (count >= FEWEST_ROWS) & (square > diagonal * RESOLVED_SHARE) & (corrected > 0)
        found["corrected_participation_ratio"].append(np.where(known, corrected, np.nan))
    return {name: np.stack(values) for name, values in found.items()}


def _singular_values(states_LKD: np.ndarray, products_LKK: np.ndarray, *, center: bool) -> np.ndarray:
    """As `kernels.rank.singular_values`, (L, min(K, D)), from products that are known already."""
    _, count, width = states_LKD.shape
    possible = min(count - center, width)
    energy = np.linalg.eigvalsh(products_LKK)[:, ::-1][:, : min(count, width)].clip(min=0.0)
    energy[:, possible:] = 0.0
    spectra = np.sqrt(energy)
    # There the kernel decomposes the states themselves.
    unreliable = (energy[:, possible - 1] < GRAM_LIMIT * energy[:, 0]) & (energy[:, 0] > 0)
    if possible and unreliable.any():
        spectra[unreliable] = rank.singular_values(states_LKD[unreliable], center=center)
    return spectra


def _cka(centered_LKK: np.ndarray) -> np.ndarray:
    """Unbiased CKA of every two depths, as `kernels.similarity.cka_matrix`."""
    depths, n, _ = centered_LKK.shape
    if n < 4:
        return np.full((depths, depths), np.nan)
    # At unit size, so that no product of two depths overflows.
    diagonal = np.diagonal(centered_LKK, axis1=1, axis2=2)
    size = diagonal.max(axis=1)
    size = np.where(size > 0, size, 1.0)[:, None]
    distinct = centered_LKK.reshape(depths, -1) / size
    distinct[:, :: n + 1] = 0.0
    squares = diagonal / size
    traces = squares.sum(axis=1)
    # Song's HSIC₁ where rows of the products add up to zero, of distinct tokens alone: see `similarity.layer_cka`.
    table = distinct @ distinct.T + np.outer(traces, traces) / ((n - 1) * (n - 2))
    table -= 2.0 / (n - 2) * (squares @ squares.T)
    own = np.diagonal(table)
    return np.asarray(kernel.cka_from_hsic(table, own[:, None], own[None, :]))


def _angles(states_LKD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean angles between depths as shares of π, (L, L), and the block influence, (L,)."""
    # float64: near 1 an error of ε in a cosine is √(2ε) in the angle
    unit_KLD, directed_KL, turned = unit_tokens(states_LKD)
    both = directed_KL[:, :, None] & directed_KL[:, None, :]  # (K, L, L)
    angles = np.arccos(np.clip(unit_KLD @ unit_KLD.swapaxes(1, 2), -1.0, 1.0)) / np.pi
    number = both.sum(axis=0)
    mean = np.where(both, angles, 0.0).sum(axis=0) / np.where(number > 0, number, np.nan)
    # Of a depth with itself 0, and not what rounding leaves of the arc cosine of 1.
    np.fill_diagonal(mean, np.where(np.diagonal(number) > 0, 0.0, np.nan))
    known = directed_KL[:, 1:] & directed_KL[:, :-1]
    influence = np.full(len(mean), np.nan)
    number = known.sum(axis=0)
    influence[1:] = np.where(known, turned, 0.0).sum(axis=0) / np.where(number > 0, number, np.nan)
    return mean, influence
