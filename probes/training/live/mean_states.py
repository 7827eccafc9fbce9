"""How many directions do the sampled tokens use, and which depths are alike? In the mean over streams, from shared products.

The numbers are those of `metrics.collapse` and `metrics.similarity` for pooled tokens, which a test compares; here
all depths are computed at once and without labels, since an analysis of every step would cost as much as the step.
Shapes: L depth, K token, D feature.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from depthscope.diagnostics.kernels import rank
from depthscope.diagnostics.kernels import similarity as kernel
from depthscope.diagnostics.kernels.rank.participation import corrected_ratio
from depthscope.diagnostics.metrics.collapse import FEWEST_ROWS, RESOLVED_SHARE

Tables = dict[str, tuple[tuple[str, ...], np.ndarray]]

RANKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "effective_rank": rank.effective_rank_of,
    "entropy_rank": rank.entropy_rank_of,
    "participation_ratio": rank.participation_ratio_of,
    "stable_rank": rank.stable_rank_of,
}
RANK_DIMS = ("scope", "tokens", "centering", "depth")


def mean_state_metrics(states_LKD: np.ndarray, ordinary_K: np.ndarray) -> Tables:
    """Ranks, CKA, angles and block influence of the sampled tokens, all of them and those without massive activations.

    Parameters
    ----------
    states_LKD : ndarray
        Mean over streams, float32.
    ordinary_K : ndarray of bool
        Tokens without massive activations.

    Returns
    -------
    dict of str to (dims, ndarray)
        By the names of the catalogue.
    """
    every = _of_tokens(states_LKD)
    ordinary = every if ordinary_K.all() else _of_tokens(states_LKD[:, ordinary_K])
    found: Tables = {}
    for name in (*RANKS, "corrected_participation_ratio"):
        found[name] = (RANK_DIMS, np.stack([every[name], ordinary[name]])[None])
    tables = np.stack([every["cka"], ordinary["cka"]])
    adjacent = np.full(tables.shape[:-1], np.nan)
    adjacent[:, 1:] = np.diagonal(tables, offset=-1, axis1=-2, axis2=-1)
    found["cka"] = (("estimator", "tokens", "depth", "other_depth"), tables[None])
    found["adjacent_cka"] = (("estimator", "tokens", "depth"), adjacent[None])
    angles = np.stack([every["angular_distance"], ordinary["angular_distance"]])
    found["angular_distance"] = (("tokens", "depth", "other_depth"), angles)
    influences = np.stack([every["block_influence"], ordinary["block_influence"]])
    found["block_influence"] = (("tokens", "depth"), influences)
    counts = np.array([[states_LKD.shape[1], ordinary_K.sum()]], dtype=float)
    repeated = np.repeat(np.where(counts > 0, counts, np.nan)[..., None], len(states_LKD), axis=-1)
    found["num_tokens"] = (("scope", "tokens", "depth"), repeated)
    return found


def _of_tokens(states_LKD: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers of some tokens; NaN at depths that are not finite, and where there are too few tokens."""
    depths, count, _ = states_LKD.shape
    if not count:
        empty = np.full((depths, depths), np.nan)
        ranks = dict.fromkeys((*RANKS, "corrected_participation_ratio"), np.full((2, depths), np.nan))
        return {**ranks, "cka": empty, "angular_distance": empty, "block_influence": empty[0]}
    finite = np.isfinite(states_LKD).all(axis=(1, 2))
    if not finite.all():  # kernels refuse what is not finite
        states_LKD = np.where(finite[:, None, None], states_LKD, np.float32(0.0))
    states = torch.from_numpy(np.ascontiguousarray(states_LKD))
    found = _ranks(states)
    found["cka"] = kernel.cka_matrix(states, unbiased=True).numpy()
    found["angular_distance"], found["block_influence"] = _angles(states)
    broken = ~finite
    for name, values in found.items():
        values[..., broken] = np.nan
        if name in ("cka", "angular_distance"):
            values[broken] = np.nan
    found["block_influence"][1:][broken[:-1]] = np.nan
    return found


def _ranks(states_LKD: torch.Tensor) -> dict[str, np.ndarray]:
    """Ranks by centring and depth, (2, L)."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*RANKS, "corrected_participation_ratio")}
    rows = states_LKD.double()
    count = np.full(len(rows), float(rows.shape[1]))
    for center in (False, True):
        spectra = rank.singular_values(states_LKD, center=center).numpy()
        for name, measure in RANKS.items():
            found[name].append(measure(spectra))
        about = rows - rows.mean(1, keepdim=True) if center else rows
        diagonal = torch.linalg.vecdot(about, about).square().sum(1).numpy()
        energy = spectra**2
        square = (energy**2).sum(axis=-1)
        corrected = corrected_ratio(energy.sum(axis=-1) ** 2, square, diagonal, count, center=center)
        known = (count >= FEWEST_ROWS) & (square > diagonal * RESOLVED_SHARE) & (corrected > 0)
        found["corrected_participation_ratio"].append(np.where(known, corrected, np.nan))
    return {name: np.stack(values) for name, values in found.items()}


def _angles(states_LKD: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean angles between depths as shares of π, (L, L), and the block influence, (L,)."""
    tokens = states_LKD.transpose(
        0, 1
    ).double()  # float64: near 1 an error of ε in a cosine is √(2ε) in the angle
    length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    directed = length > 0
    unit = tokens / torch.where(directed, length, 1.0)
    both = (directed & directed.transpose(1, 2)).numpy()  # (K, L, L)
    angles = np.arccos(np.clip((unit @ unit.mT).numpy(), -1.0, 1.0)) / np.pi
    number = both.sum(axis=0)
    mean = np.where(both, angles, 0.0).sum(axis=0) / np.where(number > 0, number, np.nan)
    # Of a depth with itself 0, and not what rounding leaves of the arc cosine of 1.
    np.fill_diagonal(mean, np.where(np.diagonal(number) > 0, 0.0, np.nan))
    # 1 − cos by the difference of unit vectors, which does not cancel for blocks that turn states by little.
    turned = (unit[:, 1:] - unit[:, :-1]).square().sum(-1).numpy() / 2.0
    known = both[:, range(1, both.shape[1]), range(both.shape[1] - 1)]
    influence = np.full(len(mean), np.nan)
    number = known.sum(axis=0)
    influence[1:] = np.where(known, turned, 0.0).sum(axis=0) / np.where(number > 0, number, np.nan)
    return mean, influence
