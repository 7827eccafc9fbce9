"""Moments of second order of many tokens: products of float32 blocks, all else in float64.

Shapes: t the tokens of a block, k forwards in it, D feature. Each forward's tokens are taken about their own mean, so that no
common offset and no first forward, however odd, costs digits: the products are exact to about 2e-7 of √(C_ii C_jj).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

ADDED = (
    256  # tokens in a product at most, since they are added in float32, where equal ones round the same way
)
IN_FLOAT32 = 8  # products, added in float32 before they are added to what is held
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

    signed: Sequence[
        torch.Tensor
    ]  # (t, D) float32; float64 for repeated tokens: small directions are exact zeros
    signs: Sequence[torch.Tensor]  # (t,) of the same kind
    count_k: torch.Tensor  # real tokens of each forward, float64
    shift_kD: torch.Tensor  # float64
    total_kD: torch.Tensor  # Σ (x − shift) of each, float64
    size: torch.Tensor  # a power of two, so that nothing is rounded by it


class Means(NamedTuple):
    """What was held and each forward of a block: their counts and means, and the mean of all; float64."""

    counts_k: torch.Tensor
    means_kD: torch.Tensor
    mean_D: torch.Tensor


def means(count: torch.Tensor | None, mean_D: torch.Tensor, block: Block) -> Means:
    """Counts and means, of what was held first where there is any.

    Parameters
    ----------
    count : Tensor or None
        Of the tokens held; None where there are none.
    mean_D : Tensor
        Of these.
    block : Block
        Further tokens.

    Returns
    -------
    Means
    """
    counts_k = block.count_k
    means_kD = block.shift_kD + block.total_kD / counts_k[:, None].clamp_min(1)
    if count is not None:
        counts_k, means_kD = torch.cat([count[None], counts_k]), torch.cat([mean_D[None], means_kD])
    near_D = means_kD[-1]  # near the others, so that no digits are lost
    return Means(counts_k, means_kD, near_D + counts_k @ (means_kD - near_D) / counts_k.sum().clamp_min(1))


def added(held: Moments | None, block: Block) -> Moments:
    """Moments of the tokens held and of those of a block.

    Parameters
    ----------
    held : Moments or None
        Of earlier tokens; its scatter is written, and handed on.
    block : Block
        Further tokens. Signs change no product.

    Returns
    -------
    Moments
    """
    rounding = DOUBLE if block.signed[0].dtype == torch.float64 else SINGLE
    width = block.signed[0].shape[1]
    if held is None:
        nothing = block.total_kD.new_zeros(width)
        held = Moments(block.size.new_zeros(()), nothing, nothing.new_zeros(width, width), rounding)
        counts_k, means_kD, mean_D = means(None, nothing, block)
    else:
        counts_k, means_kD, mean_D = means(held.count, held.mean_D, block)
    apart, away_kD = means_kD - mean_D, block.total_kD / block.count_k[:, None].clamp_min(1)
    left, right = torch.cat([-away_kD, counts_k[:, None] * apart]), torch.cat([block.total_kD, apart])
    _add_products(held.scatter_DD, block, left, right)
    return Moments(counts_k.sum(), mean_D, held.scatter_DD, max(held.rounding, rounding))


def _add_products(
    scatter_DD: torch.Tensor, block: Block, left_kD: torch.Tensor, right_kD: torch.Tensor
) -> None:
    """Add the block's Gram matrix and leftᵀ right, on and right of the diagonal: strip by strip, in the cache."""
    short = min(len(signed_tD) for signed_tD in block.signed) < ADDED // 2
    whole = [torch.cat(tuple(block.signed))] if short else block.signed  # small products are slow
    parts = [part for signed_tD in whole for part in signed_tD.split(ADDED) if len(part)]
    square = block.size.double().square()
    for start in range(0, len(scatter_DD), STRIP):
        rows = slice(start, start + STRIP)
        strip = scatter_DD[rows, start:]
        for some in (parts[i : i + IN_FLOAT32] for i in range(0, len(parts), IN_FLOAT32)):
            product = some[0][:, rows].T @ some[0][:, start:]
            for part in some[1:]:
                product.addmm_(part[:, rows].T, part[:, start:])
            strip.addcmul_(product, square)
        strip.addmm_(left_kD[:, rows].T, right_kD[:, start:])


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
