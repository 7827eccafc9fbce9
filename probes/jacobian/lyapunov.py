"""Lyapunov exponents along depth: how fast the k fastest perturbations grow from block to block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from depthscope.diagnostics.errors import InputError
from depthscope.probes.jacobian.estimators import (
    LinearMap,
    columns,
    gaussian,
    orthonormal,
    require_least,
    require_rank,
)
from depthscope.probes.jacobian.operator import block_jacobians
from depthscope.probes.jacobian.state_graph import Tokens


@dataclass(frozen=True, eq=False)
class LyapunovSpectrum:
    """Exponents (k,) per block, their change in the last sweep, and the logs (block, k) whose mean they are."""

    exponents: np.ndarray
    errors: np.ndarray
    increments: np.ndarray
    sweeps: int
    seed: int


def lyapunov_spectrum(
    model: nn.Module,
    batch: Any,
    k: int,
    *,
    start: int | None = None,
    stop: int | None = None,
    tokens: Tokens = "all",
    sweeps: int = 3,
    seed: int = 0,
    **selection: Any,
) -> LyapunovSpectrum:
    """The k largest Lyapunov exponents of a model's residual chain, along depth.

    λ_i = (1/L) Σ_l ln|R_l,ii| with J_l Q_{l−1} = Q_l R_l for the block Jacobians J_l; see `lyapunov_exponents`.

    ``k``: how many exponents; each costs one product per block and pass.
    ``tokens``: ``"all"`` is the chain rule; ``"own"`` multiplies the tokens' own block Jacobians and leaves attention's
    detours out.
    ``**selection``: ``layers, layout, streams, mask, chain, positions, routing`` as in `probes.jacobian.jacobian`.

    Examples
    --------
    >>> model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    >>> with torch.no_grad():
    ...     for layer in model:
    ...         _ = layer.weight.copy_(torch.diag(torch.tensor([2.0, 0.5])))
    >>> (lyapunov_spectrum(model, torch.ones(1, 2), 2).exponents / np.log(2)).round(6).tolist()
    [1.0, -1.0]
    """
    blocks = block_jacobians(model, batch, start=start, stop=stop, tokens=tokens, **selection)
    return lyapunov_exponents(blocks, k, sweeps=sweeps, seed=seed)


def lyapunov_exponents(
    blocks: Sequence[LinearMap], k: int, *, sweeps: int = 3, seed: int = 0
) -> LyapunovSpectrum:
    """The k largest Lyapunov exponents of a product of maps, by QR accumulation.

    J_l Q_{l−1} = Q_l R_l,   λ_i = (1/L) Σ_l ln|R_l,ii|.

    A sweep starts from a Q_0 that the transposed product has turned towards the top right singular vectors of J_L … J_1, so
    the exponents converge to (1/L) ln σ_i of the end-to-end product, without forming it and without overflow at any depth.

    ``sweeps``: forward passes; between two of them one pass with the transposes.
    Returns: Natural logarithms per block; −inf where the product loses rank. ``errors`` are NaN for one sweep.
    Raises InputError: Where the maps do not chain, or k is outside 1 … the smallest dimension.

    Notes
    -----
    Benettin et al. 1980. Costs k·L products with J a sweep and as many with Jᵀ between sweeps.

    Examples
    --------
    >>> from depthscope.probes.jacobian.estimators import DenseMap
    >>> (lyapunov_exponents([DenseMap([[2.0, 0.0], [0.0, 0.5]])] * 3, 2).exponents / np.log(2)).round(9).tolist()
    [1.0, -1.0]
    """
    require_least("sweeps", sweeps, 1)
    require_least("blocks", len(blocks), 1)
    _require_chained(blocks)
    for op in blocks:
        require_rank(k, op)
    # A Gaussian start has a part along every direction, almost surely: none is missed.
    basis = orthonormal(gaussian((blocks[0].shape[1], k), seed, blocks[0]))
    previous, (basis, increments) = torch.full((k,), torch.nan), _multiply_through(blocks, basis)
    for _ in range(sweeps - 1):
        # the transposes turn the basis towards the product's right singular vectors, as a power iteration does
        for op in reversed(blocks):
            basis = orthonormal(columns(op.rmatvec, basis))
        previous, (basis, increments) = increments.mean(0), _multiply_through(blocks, basis)
    # the change in the last sweep, since the distance to the limit is unknown; NaN after a single sweep
    exponents = increments.mean(0)
    return LyapunovSpectrum(
        exponents.numpy(), (exponents - previous).abs().numpy(), increments.numpy(), sweeps, seed
    )


def _multiply_through(blocks: Sequence[LinearMap], basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass through the maps: the last basis, and ln|R_ii| of every map, (L, k)."""
    rows = []
    for op in blocks:
        basis, upper = torch.linalg.qr(columns(op.matvec, basis))
        # Logs add up where the diagonals would overflow in depth
        rows.append(upper.diagonal().abs().log().cpu())
    return basis, torch.stack(rows)


def _require_chained(blocks: Sequence[LinearMap]) -> None:
    for number, (earlier, later) in enumerate(pairwise(blocks)):
        if earlier.shape[0] != later.shape[1]:
            raise InputError(
                f"map {number} gives {earlier.shape[0]} entries and map {number + 1} takes {later.shape[1]}; "
                "pass the maps in the order of depth, the earliest first"
            )
