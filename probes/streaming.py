"""Moments of second order over every real token, in one pass and in memory that no number of batches enlarges.

Shapes: B batch, T token, t = B T, N stream, D feature. A forward's tokens are taken about their own mean, multiplied in
float32 blocks, and all else is added in float64: exact to about 2e-7 at any common offset. Of several streams the mean is seen.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch

from probes.sketch import Rows, Sketch, joined, sketched, token_index

ADDED = 4096  # tokens in a block at most, since they are added in float32
ROUNDING = 2.0**-23  # of a product of float32 blocks, relative to √(C_ii C_jj)


class Moments(NamedTuple):
    """Count, mean and Σ (x − mean)(x − mean)ᵀ of some tokens, float64."""

    count: torch.Tensor
    mean_D: torch.Tensor
    scatter_DD: torch.Tensor


class Held(NamedTuple):
    """A depth of the present forward, kept until its end: which tokens are heavy is known only then."""

    shape: torch.Size
    rows: Rows
    real_BT: torch.Tensor | None


class Streaming:
    """The moments of every depth and the sketches over depths of one chain.

    Parameters
    ----------
    first_index : int
        Index of the first sequence of the forward that is to be seen.
    """

    def __init__(self, first_index: int = 0) -> None:
        self.first_index = first_index
        self.moments: dict[int, Moments] = {}
        self.sketches: dict[tuple[int, ...], Sketch] = {}
        self._held: dict[int, Held] = {}

    def see_state(
        self, depth: int, state_BTND: torch.Tensor, mask_BT: torch.Tensor | None, mean_ND: torch.Tensor
    ) -> None:
        """Add one state.

        Parameters
        ----------
        depth : int
            Depth index.
        state_BTND : Tensor
            The canonical state.
        mask_BT : Tensor or None
            True on real tokens; None where all are real.
        mean_ND : Tensor
            The mean of its real tokens, which products are taken about.
        """
        shift_ND = mean_ND.to(torch.promote_types(state_BTND.dtype, torch.float32))
        deviation = (state_BTND.detach() - shift_ND).mean(2)  # stream by stream, where the difference is exact
        if mask_BT is not None:
            deviation = torch.where(mask_BT[..., None], deviation, 0.0)
        deviation_tD, shift_D = deviation.flatten(0, 1).float(), shift_ND.double().mean(0)
        norm_t = torch.linalg.vector_norm(deviation_tD, dim=1)
        count = norm_t.new_tensor(len(norm_t)) if mask_BT is None else mask_BT.sum()
        self.moments[depth] = moments(deviation_tD, count.double(), shift_D)
        self._held[depth] = Held(state_BTND.shape, Rows(deviation_tD, shift_D, norm_t), mask_BT)

    def end_forward(self) -> None:
        """Sketch the depths of the forward together, each stage of one width and number of tokens by itself."""
        for shape, stage in groupby(sorted(self._held), key=lambda depth: self._held[depth].shape):
            depths = tuple(stage)
            held = [self._held[depth] for depth in depths]
            index = token_index(self.first_index, shape[0], shape[1], held[0].rows.norm_t.device)
            real = held[0].real_BT
            rows = [part.rows for part in held]
            self.sketches[depths] = sketched(rows, index, None if real is None else real.flatten())
        self._held.clear()

    def joined(self, other: Streaming) -> Streaming:
        """What both have seen; neither is written.

        Parameters
        ----------
        other : Streaming
            Of the same chain, over other tokens.

        Returns
        -------
        Streaming
        """
        both = Streaming()
        both.moments = self.moments | other.moments
        for depth in self.moments.keys() & other.moments.keys():
            both.moments[depth] = together(self.moments[depth], other.moments[depth])
        both.sketches = self.sketches | other.sketches
        for depths in self.sketches.keys() & other.sketches.keys():
            both.sketches[depths] = joined(self.sketches[depths], other.sketches[depths])
        return both


def moments(deviation_tD: torch.Tensor, count: torch.Tensor, shift_D: torch.Tensor) -> Moments:
    """The moments of tokens near a shift.

    Parameters
    ----------
    deviation_tD : Tensor
        Tokens less the shift, float32, zero on padding.
    count : Tensor
        How many are real.
    shift_D : Tensor
        The shift, float64; the nearer to the mean, the less is lost.

    Returns
    -------
    Moments
    """
    away_D = deviation_tD.sum(0, dtype=torch.float64) / count.clamp_min(1)
    scatter = (-count * away_D).outer(away_D)
    for block in deviation_tD.split(ADDED):
        scatter += _product(block)
    return Moments(count, shift_D + away_D, scatter)


def _product(block_tD: torch.Tensor) -> torch.Tensor:
    """The Gram matrix of features; in float64 where the user lets float32 products be rounded further."""
    exact = block_tD if torch.get_float32_matmul_precision() == "highest" else block_tD.double()
    return exact.T @ exact


def together(a: Moments, b: Moments) -> Moments:
    """The moments of two parts of the tokens (Chan, Golub and LeVeque).

    Parameters
    ----------
    a, b : Moments
        Of the parts.

    Returns
    -------
    Moments
    """
    count = a.count + b.count
    share, apart_D = b.count / count.clamp_min(1), b.mean_D - a.mean_D
    between = (a.count * share * apart_D).outer(apart_D)
    return Moments(count, a.mean_D + share * apart_D, between.add_(a.scatter_DD).add_(b.scatter_DD))


def spectra(of: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues of Σ x xᵀ and of Σ (x − mean)(x − mean)ᵀ, descending; zero beyond the rank that the tokens allow.

    Parameters
    ----------
    of : Moments
        Of one depth.

    Returns
    -------
    plain, shaken : Tensor
        (2, D): raw and centred; and the same after each entry of the sums was moved, up or down at random, by as much as
        float32 rounds: what changes by it is not known any better. NaN where a state was not finite.
    """
    width, count = len(of.mean_D), int(of.count)
    if not bool(of.scatter_DD.isfinite().all()):
        nothing = of.mean_D.new_full((2, width), torch.nan)
        return nothing, nothing
    size = of.scatter_DD.diagonal().clamp_min(0).sqrt()
    shaken = of.scatter_DD + ROUNDING * size.outer(size) * _signs(width).to(size.device)
    mean = (of.count * of.mean_D).outer(of.mean_D)
    four = torch.stack([of.scatter_DD + mean, of.scatter_DD, shaken + mean, shaken])
    top = four.diagonal(dim1=1, dim2=2).amax(1).clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    values = torch.linalg.eigvalsh(four / top[..., None]).flip(1).clamp_min(0) * top
    for row, rank in enumerate((count, count - 1) * 2):
        values[row, max(rank, 0) :] = 0
    return values[:2], values[2:]


def _signs(width: int) -> torch.Tensor:
    """A symmetric matrix of random signs, the same each time."""
    generator = torch.Generator().manual_seed(0)
    upper = torch.randint(0, 2, (width, width), generator=generator).mul(2).sub(1).double().triu()
    return upper + upper.triu(1).T
