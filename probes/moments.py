"""Moments of second order of many tokens: products of float32 blocks, all else in float64.

Shapes: t the tokens of a block, k forwards in it, D feature. Each forward's tokens are taken about their own mean, so that no
common offset and no first forward, however odd, costs digits: the products are exact to about 2e-7 of √(C_ii C_jj).
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

ADDED = (
    256  # tokens in a product at most, since they are added in float32, where equal ones round the same way
)
STRIP = 96  # features: whole strips left of the diagonal are not computed
# Relative to √(C_ii C_jj): the most that the products are off by where rounding adds up; of text it is a tenth at most.
SINGLE, DOUBLE = 2.0**-17, 2.0**-46


class Moments(NamedTuple):
    """Count, mean and Σ (x − mean)(x − mean)ᵀ of some tokens, float64; zero left of the diagonal's strips."""

    count: torch.Tensor
    mean_D: torch.Tensor
    scatter_DD: torch.Tensor
    rounding: float


class Block(NamedTuple):
    """Tokens of some forwards, each less its forward's shift, over a common size, times a random sign; zero on padding."""

    signed_tD: torch.Tensor  # float32; float64 for tokens that repeat, whose small directions are exact zeros
    sign_t: torch.Tensor
    lengths: tuple[int, ...]  # of the forwards
    count_k: torch.Tensor  # real tokens of each, float64
    shift_kD: torch.Tensor  # float64
    size: torch.Tensor  # a power of two, so that nothing is rounded by it


def added(held: Moments | None, block: Block) -> Moments:
    """Moments of the tokens held and of those of a block.

    Parameters
    ----------
    held : Moments or None
        Of earlier tokens; not written.
    block : Block
        Further tokens. Signs change no product.

    Returns
    -------
    Moments
    """
    places = list(pairwise(accumulate(block.lengths, initial=0)))
    sums = [block.sign_t[a:b] @ block.signed_tD[a:b] for a, b in places]
    total_kD = torch.stack(sums).double() * block.size
    away_kD = total_kD / block.count_k[:, None].clamp_min(1)
    rounding = DOUBLE if block.signed_tD.dtype == torch.float64 else SINGLE
    if held is None:
        nothing = total_kD.new_zeros(())
        held = Moments(nothing, block.shift_kD[-1], total_kD.new_zeros(len(total_kD.T), 1), rounding)
    means = torch.cat([held.mean_D[None], block.shift_kD + away_kD])
    counts = torch.cat([held.count[None], block.count_k])
    mean = _mean(means, counts)
    apart = means - mean
    left, right = torch.cat([-away_kD, counts[:, None] * apart]), torch.cat([total_kD, apart])
    scatter = _products(held.scatter_DD, block, left, right)
    return Moments(counts.sum(), mean, scatter, max(held.rounding, rounding))


def _mean(means_kD: torch.Tensor, counts_k: torch.Tensor) -> torch.Tensor:
    """The common mean, added up from the last one, which is near the others."""
    near_D = means_kD[-1]
    return near_D + counts_k @ (means_kD - near_D) / counts_k.sum().clamp_min(1)


def _products(
    held_DD: torch.Tensor, block: Block, left_kD: torch.Tensor, right_kD: torch.Tensor
) -> torch.Tensor:
    """What was held, the block's Gram matrix and leftᵀ right, on and right of the diagonal: strip by strip, in the cache."""
    parts = block.signed_tD.split(ADDED)
    width, square = block.signed_tD.shape[1], block.size.double().square()
    scatter = held_DD.new_empty(width, width)
    for start in range(0, width, STRIP):
        rows = slice(start, start + STRIP)
        scatter[rows, :start] = 0
        strip = scatter[rows, start:]
        old = held_DD[rows, start:] if held_DD.shape[1] == width else torch.zeros_like(strip)
        for part in parts:
            old = torch.addcmul(old, part[:, rows].T @ part[:, start:], square, out=strip)
        strip.addmm_(left_kD[:, rows].T, right_kD[:, start:])
    return scatter


def together(a: Moments, b: Moments) -> Moments:
    """The moments of two parts of the tokens (Chan, Golub and LeVeque).

    Parameters
    ----------
    a, b : Moments
        Of the parts; not written.

    Returns
    -------
    Moments
    """
    count = a.count + b.count
    share, apart_D = b.count / count.clamp_min(1), b.mean_D - a.mean_D
    scatter = (a.scatter_DD + b.scatter_DD).addr_(a.count * share * apart_D, apart_D)
    mean_D = torch.where(a.count > 0, a.mean_D + share * apart_D, b.mean_D)
    return Moments(count, mean_D, scatter, max(a.rounding, b.rounding))
