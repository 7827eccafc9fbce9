"""Sums that tell how alike depths are: a signed row sketch, the same for every depth, and the heaviest tokens themselves.

Shapes: L depth, t the tokens of a forward, D feature, m bucket, h heavy token, g group of buckets. Every token goes, with a
random sign, into one of m buckets; both follow from its sequence and position, so that every depth, batch and process agrees.
The heaviest tokens, few of which can hold most of the energy, stay out of the buckets as they are; one that a heavier token
displaces goes to its bucket. What is held is the same in any order of merging.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

BUCKETS = 256
HEAVY = 128
GROUPS = 16  # of buckets; leaving each out in turn tells the error
LOW = 0xFFFFFFFF
GOLDEN = (
    0x9E3779B1  # odd, 2³² over the golden ratio: numbers of sequences that are near each other lie far apart
)


class Sketch(NamedTuple):
    """What is kept of all tokens seen, at some depths of one width."""

    count: torch.Tensor
    buckets_LmD: torch.Tensor
    signs_m: torch.Tensor
    heavy_LhD: torch.Tensor
    index_h: torch.Tensor
    score_h: torch.Tensor  # negative where padding fills a place


class Rows(NamedTuple):
    """One depth of a forward: tokens less a shift over their largest size, zero on padding."""

    deviation_tD: torch.Tensor  # float32
    size: torch.Tensor
    shift_D: torch.Tensor


def token_index(first: int, sequences: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Numbers of tokens by their sequence and position; distinct for the first 10⁹ tokens at least.

    Parameters
    ----------
    first : int
        Index of the first sequence.
    sequences, tokens : int
        How many sequences, and how many tokens in each.
    device : device
        Where they are made.

    Returns
    -------
    Tensor
        (sequences × tokens,), int64 below 2³².
    """
    start = (torch.arange(first, first + sequences, device=device) & LOW) * GOLDEN
    return ((start[:, None] + torch.arange(tokens, device=device)) & LOW).flatten()


def sketched(rows: Sequence[Rows], index_t: torch.Tensor, real_t: torch.Tensor | None) -> Sketch:
    """The sketch of one forward; the deviations are written over.

    Parameters
    ----------
    rows : sequence of Rows
        One for each depth.
    index_t : Tensor
        As `token_index` gives it.
    real_t : Tensor or None
        False on padding.

    Returns
    -------
    Sketch
    """
    real = torch.ones_like(index_t, dtype=torch.bool) if real_t is None else real_t
    score = torch.where(real, _score(rows, real), -1.0)
    top = score.topk(min(HEAVY, len(score))).indices
    bucket, sign = _hashed(index_t)
    sign = torch.where(real, sign, 0.0).index_fill(0, top, 0.0)
    signs_m = sign.new_zeros(BUCKETS, dtype=torch.float64).index_add_(0, bucket, sign.double())
    parts = [_parts(row, top, bucket, sign, signs_m) for row in rows]
    buckets, heavy = (
        torch.stack([part.to(real.device) for part in side]) for side in zip(*parts, strict=True)
    )
    heavy = torch.where(real[top, None], heavy, 0.0)
    return Sketch(real.sum().double(), buckets, signs_m, heavy, index_t[top], score[top])


def _parts(
    row: Rows, top: torch.Tensor, bucket: torch.Tensor, sign: torch.Tensor, signs_m: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Buckets and heavy tokens of a depth, computed where it lies: a model may be spread over devices."""
    near = row.deviation_tD.device
    top, bucket, sign, signs_m = (of_all.to(near) for of_all in (top, bucket, sign, signs_m))
    heavy = row.deviation_tD[top].double() * row.size + row.shift_D
    light = row.deviation_tD.mul_(sign[:, None])  # the sign of a heavy token is 0
    held = light.new_zeros(BUCKETS, light.shape[1]).index_add_(0, bucket, light)
    return held.double() * row.size + signs_m[:, None] * row.shift_D, heavy


def _score(rows: Sequence[Rows], real_t: torch.Tensor) -> torch.Tensor:
    """The length of a token over the mean one of its forward, at the depth where that is most; 0 if it is not finite."""
    lengths = [torch.linalg.vector_norm(row.deviation_tD, dim=1).to(real_t.device) for row in rows]
    norm_Lt = torch.where(real_t, torch.stack(lengths), 0.0)
    mean_L = norm_Lt.sum(1, keepdim=True) / real_t.sum().clamp_min(1)
    return (norm_Lt / torch.where(mean_L > 0, mean_L, 1.0)).nan_to_num(0.0, 0.0).amax(0)


def _hashed(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bucket and sign of each token, those of ``diagnostics.kernels.similarity.row_sketch``."""
    for _ in range(3):
        index = ((index ^ (index >> 16)) * 0x45D9F3B) & LOW
    index = index ^ (index >> 16)
    return (index >> 1) % BUCKETS, (1 - 2 * (index & 1)).float()


def joined(a: Sketch, b: Sketch) -> Sketch:
    """The sketch of the tokens of two, none of which is in both; neither is written.

    Parameters
    ----------
    a, b : Sketch
        Of the same depths.

    Returns
    -------
    Sketch
    """
    score, index = torch.cat([a.score_h, b.score_h]), torch.cat([a.index_h, b.index_h])
    heavy = torch.cat([a.heavy_LhD, b.heavy_LhD], 1)
    order = score.argsort(descending=True, stable=True)
    kept, left = order[:HEAVY], order[HEAVY:]
    bucket, sign = _hashed(index[left])
    sign = torch.where(score[left] >= 0, sign, 0.0).double()
    buckets = (a.buckets_LmD + b.buckets_LmD).index_add_(1, bucket, heavy[:, left] * sign[:, None])
    signs = (a.signs_m + b.signs_m).index_add_(0, bucket, sign)
    return Sketch(a.count + b.count, buckets, signs, heavy[:, kept], index[kept], score[kept])


def hsic(sketch: Sketch, mean_LD: torch.Tensor, trace_L: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimates of the unbiased HSIC₁ of linear kernels between depths; exact where every token is kept as it is.

    Over pairs of buckets, and of a bucket and a heavy token, Σ_{i≠j} K_ij L_ij is estimated without bias, the mean removed
    afterwards; pairs of heavy tokens are exact, and so are the traces. Of the terms in Σ K_ii L_ii, which are small but for
    heavy tokens, the light ones are taken as equal.

    Parameters
    ----------
    sketch : Sketch
        Of all tokens.
    mean_LD, trace_L : Tensor
        The mean token and Σ ‖x − mean‖² of every depth, float64.

    Returns
    -------
    whole_LL, without_gLL : Tensor
        By all buckets, and with a group of them left out at a time; in units of each depth's mean square deviation. NaN for
        fewer than 4 tokens.
    """
    n = float(sketch.count)
    if n < 4:
        nothing = mean_LD.new_full((GROUPS + 1, len(mean_LD), len(mean_LD)), torch.nan)
        return nothing[0], nothing[1:]
    size = torch.where(trace_L > 0, trace_L / n, 1.0).sqrt()[:, None, None]
    mean = mean_LD[:, None]
    light = (sketch.buckets_LmD - sketch.signs_m[:, None] * mean) / size
    heavy = torch.where(sketch.score_h[:, None] >= 0, sketch.heavy_LhD - mean, 0.0) / size
    own = _own_terms(heavy, trace_L / size[:, 0, 0].square(), n, int((sketch.score_h >= 0).sum()))
    pairs_ggLL, mixed_gLL = _pairs(light), _mixed(heavy, light)
    kept = BUCKETS - BUCKETS // GROUPS
    whole = pairs_ggLL.sum((0, 1)) * (BUCKETS / (BUCKETS - 1)) + 2 * mixed_gLL.sum(0)
    lost = pairs_ggLL.sum(0) + pairs_ggLL.sum(1) - pairs_ggLL.diagonal().movedim(-1, 0)
    pairs = (pairs_ggLL.sum((0, 1)) - lost) * (BUCKETS**2 / (kept * (kept - 1)))
    without = pairs + 2 * (mixed_gLL.sum(0) - mixed_gLL) * (BUCKETS / kept)
    return (whole + own) / (n * (n - 3)), (without + own) / (n * (n - 3))


def _own_terms(heavy_LhD: torch.Tensor, trace_L: torch.Tensor, n: float, num_heavy: int) -> torch.Tensor:
    """Pairs of heavy tokens, and Song's terms in the diagonals: Σ_{i≠j} − 2/(n−2) Σ_i K_ii L_ii + tr K tr L /((n−1)(n−2))."""
    square = heavy_LhD @ heavy_LhD.mT
    diagonal = square.diagonal(dim1=1, dim2=2)
    rest = trace_L - diagonal.sum(1)
    shared = diagonal @ diagonal.T + rest.outer(rest) / max(n - num_heavy, 1.0)
    flat = (square - torch.diag_embed(diagonal)).flatten(1)
    return flat @ flat.T - 2.0 / (n - 2.0) * shared + trace_L.outer(trace_L) / ((n - 1.0) * (n - 2.0))


def _pairs(light_LmD: torch.Tensor) -> torch.Tensor:
    """Products of the Gram matrices of the buckets without their diagonals, by both groups of buckets: (g, g, L, L)."""
    gram = light_LmD @ light_LmD.mT
    gram.diagonal(dim1=1, dim2=2).zero_()
    blocks = gram.unflatten(2, (GROUPS, -1)).unflatten(1, (GROUPS, -1)).permute(1, 3, 0, 2, 4).flatten(3)
    return blocks @ blocks.mT


def _mixed(heavy_LhD: torch.Tensor, light_LmD: torch.Tensor) -> torch.Tensor:
    """Products between heavy tokens and buckets, by the group of buckets: (g, L, L)."""
    blocks = (heavy_LhD @ light_LmD.mT).unflatten(2, (GROUPS, -1)).permute(2, 0, 1, 3).flatten(2)
    return blocks @ blocks.mT
