"""What is the covariance of many tokens, to nearly float64? Sums of float32 products about each forward's own mean.

Shapes: t the tokens of a block, k forwards in it, D feature. Each forward's tokens are taken about their own mean, so that a
common offset, or a first forward far from all others, costs no digits: the products are exact to about 2e-7 of √(C_ii C_jj).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

TOKENS_PER_PRODUCT = 256  # added in float32, where equal tokens round in the same direction and errors add up
PRODUCTS_IN_FLOAT32 = 8  # products that are added in float32 before the float64 scatter takes them
STRIP_WIDTH = 96  # features; C is symmetric: strips of rows from the diagonal on, which fit into the cache
# Bounds of the products' errors relative to √(C_ii C_jj), where all rounding adds up; on text a tenth at most was seen.
ROUNDING_FLOAT32, ROUNDING_FLOAT64 = 2.0**-17, 2.0**-46


class Moments(NamedTuple):
    """Count, mean and Σ (x − mean)(x − mean)ᵀ of some tokens, float64; left of the diagonal's strips the scatter is 0."""

    count: torch.Tensor
    mean_D: torch.Tensor
    scatter_DD: torch.Tensor
    rounding: float


class TokenBlock(NamedTuple):
    """Tokens of some forwards as sign · (x − shift) / size, with each forward's shift and a random sign; 0 on padding."""

    # (t, D) of each forward, float32; float64 for repeated tokens, whose covariance has directions that are exactly zero.
    signed: Sequence[torch.Tensor]
    signs: Sequence[torch.Tensor]  # (t,) of the same type
    count_k: torch.Tensor  # real tokens of each forward, float64
    shift_kD: torch.Tensor  # float64
    total_kD: torch.Tensor  # Σ (x − shift) of each, float64
    size: torch.Tensor  # a power of two, so that dividing by it rounds nothing


class CombinedMeans(NamedTuple):
    """Counts and means of the earlier tokens and of each forward of a block, and the mean of all; float64."""

    counts_k: torch.Tensor
    means_kD: torch.Tensor
    mean_D: torch.Tensor


def combined_means(count: torch.Tensor | None, mean_D: torch.Tensor, block: TokenBlock) -> CombinedMeans:
    """Combine the mean of earlier tokens, if there are any, with those of a block; the earlier tokens come first."""
    counts_k = block.count_k
    means_kD = block.shift_kD + block.total_kD / counts_k[:, None].clamp_min(1)
    if count is not None:
        counts_k, means_kD = torch.cat([count[None], counts_k]), torch.cat([mean_D[None], means_kD])
    # Averaged as differences from one of the means: of a large common offset the sum itself would lose digits.
    origin_D = means_kD[-1]
    mean_D = origin_D + counts_k @ (means_kD - origin_D) / counts_k.sum().clamp_min(1)
    return CombinedMeans(counts_k, means_kD, mean_D)


def add_block(moments: Moments | None, block: TokenBlock) -> Moments:
    """Moments of the earlier tokens together with those of a block.

    With m the new mean, n_k, m_k and s_k the count, mean and shift of part k, and T_k = Σ (x − s_k):
    Σ (x − m)(x − m)ᵀ = Σ_k [Σ (x − s_k)(x − s_k)ᵀ − T_k T_kᵀ / n_k + n_k (m_k − m)(m_k − m)ᵀ].

    ``moments``: of the earlier tokens; its scatter is overwritten and returned.
    ``block``: further tokens. Their signs cancel in every product.
    """
    rounding = ROUNDING_FLOAT64 if block.signed[0].dtype == torch.float64 else ROUNDING_FLOAT32
    width = block.signed[0].shape[1]
    if moments is None:
        zeros = block.total_kD.new_zeros(width)
        moments = Moments(block.size.new_zeros(()), zeros, zeros.new_zeros(width, width), rounding)
        counts_k, means_kD, mean_D = combined_means(None, zeros, block)
    else:
        counts_k, means_kD, mean_D = combined_means(moments.count, moments.mean_D, block)
    # Both corrections of the equation as one product: left.T @ right.
    difference_kD = means_kD - mean_D
    shift_error_kD = block.total_kD / block.count_k[:, None].clamp_min(1)
    left_kD = torch.cat([-shift_error_kD, counts_k[:, None] * difference_kD])
    right_kD = torch.cat([block.total_kD, difference_kD])
    _add_products(moments.scatter_DD, block, left_kD, right_kD)
    return Moments(counts_k.sum(), mean_D, moments.scatter_DD, max(moments.rounding, rounding))


def _add_products(
    scatter_DD: torch.Tensor, block: TokenBlock, left_kD: torch.Tensor, right_kD: torch.Tensor
) -> None:
    """Add the block's Gram matrix and leftᵀ right, on and right of the diagonal, strip by strip."""
    # Matrix products of few tokens are slow: short forwards are joined first.
    short = min(len(signed_tD) for signed_tD in block.signed) < TOKENS_PER_PRODUCT // 2
    joined = [torch.cat(tuple(block.signed))] if short else block.signed
    parts = [part for signed_tD in joined for part in signed_tD.split(TOKENS_PER_PRODUCT) if len(part)]
    square = block.size.double().square()
    for start in range(0, len(scatter_DD), STRIP_WIDTH):
        rows = slice(start, start + STRIP_WIDTH)
        strip = scatter_DD[rows, start:]
        for first in range(0, len(parts), PRODUCTS_IN_FLOAT32):
            some = parts[first : first + PRODUCTS_IN_FLOAT32]
            product = some[0][:, rows].T @ some[0][:, start:]
            for part in some[1:]:
                product.addmm_(part[:, rows].T, part[:, start:])
            strip.addcmul_(product, square)  # type promotion: the float32 product is added in float64
        strip.addmm_(left_kD[:, rows].T, right_kD[:, start:])


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of two sets of tokens together (Chan, Golub and LeVeque 1983); neither is overwritten.

    C = C_a + C_b + n_a n_b / (n_a + n_b) · (m_b − m_a)(m_b − m_a)ᵀ.
    """
    count = a.count + b.count
    share, difference_D = b.count / count.clamp_min(1), b.mean_D - a.mean_D
    scatter = (a.scatter_DD + b.scatter_DD).addr_(a.count * share * difference_D, difference_D)
    # The mean of no tokens is not used
    mean_D = torch.where(a.count > 0, a.mean_D + share * difference_D, b.mean_D)
    return Moments(count, mean_D, scatter, max(a.rounding, b.rounding))
