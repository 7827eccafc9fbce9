"""How similar are depths over all tokens? A signed row sketch, the same for every depth, and the heaviest tokens exactly.

Shapes: L depth, t tokens of a forward, D feature, m bucket, h heavy token, g group of buckets. Every token is added, with a
random sign, to one of m buckets (a count sketch); both follow from its sequence and position, so that every depth, batch and
process agrees. The heaviest tokens, few of which can have most of the energy, are stored as they are; one that a heavier token
displaces is added to its bucket. The result is the same in any order of merging.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from depthscope.probes.statistics.second_moments import TokenBlock, combined_means

NUM_BUCKETS = 512
NUM_HEAVY = 128
NUM_GROUPS = 16  # of buckets: the jackknife leaves out each in turn, which gives the error of the estimate
LOW_32_BITS = 0xFFFFFFFF
# 2³² over the golden ratio (Fibonacci hashing): multiples of it spread evenly, so that sequences with consecutive numbers
# start far from each other and their tokens' indices do not overlap. It is odd: no two sequences start with
# the same indices.
GOLDEN = 0x9E3779B1


class Sketch(NamedTuple):
    """The sketch of all tokens so far, at some depths of one width."""

    count: torch.Tensor
    mean_LD: torch.Tensor
    trace_L: torch.Tensor  # Σ ‖x − mean‖²
    buckets_LmD: torch.Tensor  # Σ sign · x
    signs_m: torch.Tensor  # Σ sign
    heavy_LhD: torch.Tensor
    index_h: torch.Tensor
    score_h: torch.Tensor  # negative where padding fills a slot


class TokenPlacement(NamedTuple):
    """Bucket, sign and heaviness of the tokens of a forward, the same at every depth."""

    real_t: torch.Tensor
    count: torch.Tensor  # of real tokens, float64
    sign_t: torch.Tensor  # float32; 0 on padding
    bucket_t: torch.Tensor
    top_h: torch.Tensor  # positions of the heaviest tokens
    index_h: torch.Tensor
    score_h: torch.Tensor  # negative where padding fills a slot


def token_index(sequences: torch.Tensor, tokens: int) -> torch.Tensor:
    """Numbers of tokens by their sequence and position; distinct for the first 10⁹ tokens at least."""
    start = (sequences & LOW_32_BITS) * GOLDEN
    return ((start[:, None] + torch.arange(tokens, device=start.device)) & LOW_32_BITS).flatten()


def heaviness(norm_Lt: torch.Tensor, real_t: torch.Tensor) -> torch.Tensor:
    """How heavy tokens are: max over depths of a token's norm over the mean norm of its forward.

    ``norm_Lt``: norm of every token of a forward, about the forward's mean.
    ``real_t``: false on tokens that do not count.
    Returns: (t,), negative on tokens that do not count.
    """
    norm_Lt = torch.where(real_t, norm_Lt, 0.0)
    mean_L = norm_Lt.sum(1, keepdim=True) / real_t.sum().clamp_min(1)
    return torch.where(real_t, (norm_Lt / torch.where(mean_L > 0, mean_L, 1.0)).amax(0), -1.0)


def place_tokens(index_t: torch.Tensor, real_t: torch.Tensor, score_t: torch.Tensor) -> TokenPlacement:
    """Find the heaviest tokens of a forward, and the bucket and the sign of every token."""
    score_h, top_h = score_t.topk(min(NUM_HEAVY, len(score_t)))
    bucket_t, sign_t = bucket_and_sign(index_t)
    sign_t = torch.where(real_t, sign_t, 0.0)
    return TokenPlacement(real_t, real_t.sum().double(), sign_t, bucket_t, top_h, index_t[top_h], score_h)


class SketchUpdate:
    """Adds the tokens of some forwards to a sketch, depth by depth.

    ``earlier``: of earlier tokens; its numbers of every depth are overwritten and returned in `sketch`.
    ``placements``: of the tokens of each forward.
    ``num_depths, width``: number of depths and of features.
    """

    def __init__(
        self, earlier: Sketch | None, placements: Sequence[TokenPlacement], num_depths: int, width: int
    ) -> None:
        self._earlier, self._placements = earlier, placements
        self._forward_h = torch.cat([torch.full_like(of.top_h, k) for k, of in enumerate(placements)])
        score, index = (
            torch.cat([of.score_h for of in placements]),
            torch.cat([of.index_h for of in placements]),
        )
        # Of all heavy tokens of the forwards only the heaviest are treated as such: the others are added to their buckets
        # like light ones, in float32.
        score, self._top = score.topk(min(NUM_HEAVY, len(score)))
        index = index[self._top]
        self._buckets = self._buckets_without_heavy()
        self._signs_km = torch.stack(
            [_signs_by_bucket(of, bucket) for of, bucket in zip(placements, self._buckets, strict=True)]
        )
        count, signs_m = torch.stack([of.count for of in placements]).sum(), self._signs_km.sum(0)
        if earlier is not None:
            count, signs_m = count + earlier.count, signs_m + earlier.signs_m
            score, index = torch.cat([earlier.score_h, score]), torch.cat([earlier.index_h, index])
        self._choice = choice = _choose_heavy(score, index)
        signs_m.index_add_(0, choice.bucket, choice.sign)
        zeros, num_heavy = signs_m.new_zeros, len(choice.stored)
        if earlier is None:
            mean_LD, trace_L = zeros(num_depths, width), zeros(num_depths)
            buckets_LmD = zeros(num_depths, NUM_BUCKETS, width)
        else:
            mean_LD, trace_L, buckets_LmD = earlier.mean_LD, earlier.trace_L, earlier.buckets_LmD
        if earlier is None or earlier.heavy_LhD.shape[1] < num_heavy:
            heavy_LhD = zeros(num_depths, num_heavy, width)
        else:
            heavy_LhD = earlier.heavy_LhD
        self.sketch = Sketch(
            count,
            mean_LD,
            trace_L,
            buckets_LmD,
            signs_m,
            heavy_LhD,
            index[choice.stored],
            score[choice.stored],
        )

    def _buckets_without_heavy(self) -> list[torch.Tensor]:
        """The buckets of each forward's tokens; the heaviest get an extra one after the last, which is dropped later."""
        is_top = torch.zeros_like(self._forward_h, dtype=torch.bool).index_fill_(0, self._top, True)
        tops = is_top.split([len(of.top_h) for of in self._placements])
        return [
            of.bucket_t.index_copy(0, of.top_h, torch.where(top, NUM_BUCKETS, of.bucket_t[of.top_h]))
            for of, top in zip(self._placements, tops, strict=True)
        ]

    def add_depth(self, depth: int, block: TokenBlock, square_k: torch.Tensor) -> None:
        """Add the tokens of one depth; they may be on another device, as a model may be spread over several.

        ``square_k``: Σ ‖x − shift‖² of each forward, float64.
        """
        block_device, device = block.shift_kD.device, self.sketch.signs_m.device
        light = block.signed[0].new_zeros(NUM_BUCKETS + 1, block.signed[0].shape[1])
        for bucket, signed_tD in zip(self._buckets, block.signed, strict=True):
            light.index_add_(0, bucket.to(block_device), signed_tD)
        heavy, buckets = self._heavy_tokens(block).to(device), self.sketch.buckets_LmD[depth]
        if self._earlier is not None:
            heavy = torch.cat([self._earlier.heavy_LhD[depth], heavy])
        # The block has sign · (x − shift) / size: Σ sign · x is its sum times the size, plus Σ sign times the shift.
        buckets.addcmul_(light[:NUM_BUCKETS].to(device), block.size.to(device))
        buckets.addmm_(self._signs_km.T, block.shift_kD.to(device))
        _store_heavy(heavy, self._choice, buckets, self.sketch.heavy_LhD[depth])
        self._add_spread(depth, block, square_k)

    def _heavy_tokens(self, block: TokenBlock) -> torch.Tensor:
        """The heaviest tokens of a block, sign, size and shift undone, float64; 0 on padding."""
        device = block.shift_kD.device
        tops = [of.top_h.to(device) for of in self._placements]
        top, forward_h = self._top.to(device), self._forward_h.to(device)[self._top.to(device)]
        signed_hD = torch.cat([x_tD[h] for x_tD, h in zip(block.signed, tops, strict=True)])[top]
        sign_h = torch.cat([sign_t[h] for sign_t, h in zip(block.signs, tops, strict=True)])[top, None]
        shift_hD = block.shift_kD[forward_h] * sign_h.abs()
        return shift_hD.addcmul_(signed_hD * sign_h, block.size)

    def _add_spread(self, depth: int, block: TokenBlock, square_k: torch.Tensor) -> None:
        """Add to the mean and to Σ ‖x − mean‖², by the trace of the equation in `second_moments.add_block`."""
        mean_D, trace = self.sketch.mean_LD[depth], self.sketch.trace_L[depth]
        device = block.total_kD.device
        count = None if self._earlier is None else self._earlier.count.to(device)
        counts_k, means_kD, new_D = combined_means(count, mean_D.to(device), block)
        within = square_k - block.total_kD.square().sum(1) / block.count_k.clamp_min(1)
        between = counts_k * (means_kD - new_D).square().sum(1)
        trace += (within.sum() + between.sum()).to(trace.device)
        mean_D.copy_(new_D)


def _signs_by_bucket(of: TokenPlacement, bucket_t: torch.Tensor) -> torch.Tensor:
    """Σ sign of a forward's tokens in each bucket, float64."""
    signs = of.count.new_zeros(NUM_BUCKETS + 1)
    return signs.index_add_(0, bucket_t, of.sign_t.double())[:NUM_BUCKETS]


class _HeavyChoice(NamedTuple):
    """Which tokens are stored as they are, and the buckets and signs of the others; padding has sign 0."""

    stored: torch.Tensor
    displaced: torch.Tensor
    bucket: torch.Tensor
    sign: torch.Tensor


def _choose_heavy(score: torch.Tensor, index: torch.Tensor) -> _HeavyChoice:
    # Stable: all processes make the same choice where scores are equal
    order = score.argsort(descending=True, stable=True)
    stored, displaced = order[:NUM_HEAVY], order[NUM_HEAVY:]
    bucket, sign = bucket_and_sign(index[displaced])
    return _HeavyChoice(stored, displaced, bucket, torch.where(score[displaced] >= 0, sign, 0.0).double())


def _store_heavy(
    tokens: torch.Tensor, choice: _HeavyChoice, buckets_mD: torch.Tensor, heavy_hD: torch.Tensor
) -> None:
    """Write the chosen tokens of one depth into ``heavy_hD``, and add the displaced ones to their buckets."""
    torch.index_select(tokens, 0, choice.stored, out=heavy_hD)
    buckets_mD.index_add_(0, choice.bucket, tokens[choice.displaced] * choice.sign[:, None])


def bucket_and_sign(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hash the numbers of tokens to a bucket (int64) and a sign (1 or −1, float32) each.

    The hash is that of ``row_sketch`` in benchmarks/analysis/sketches.py.
    """
    # A multiply-xorshift hash of 32 bits. Not torch's generator, whose numbers depend on the device and on the order.
    for _ in range(3):
        index = ((index ^ (index >> 16)) * 0x45D9F3B) & LOW_32_BITS
    index = index ^ (index >> 16)
    return (index >> 1) % NUM_BUCKETS, (1 - 2 * (index & 1)).float()


def merge_sketches(a: Sketch, b: Sketch) -> Sketch:
    """The sketch of two sets of tokens together, of the same depths; neither is overwritten."""
    score, index = torch.cat([a.score_h, b.score_h]), torch.cat([a.index_h, b.index_h])
    choice = _choose_heavy(score, index)
    buckets = a.buckets_LmD + b.buckets_LmD
    heavy = a.heavy_LhD.new_empty(len(a.heavy_LhD), len(choice.stored), a.heavy_LhD.shape[2])
    for depth, tokens in enumerate(zip(a.heavy_LhD, b.heavy_LhD, strict=True)):
        _store_heavy(torch.cat(tokens), choice, buckets[depth], heavy[depth])
    signs_m = (a.signs_m + b.signs_m).index_add_(0, choice.bucket, choice.sign)
    # Mean and trace as in `second_moments.merge_moments`.
    count, difference_LD = a.count + b.count, b.mean_LD - a.mean_LD
    share = b.count / count.clamp_min(1)
    return Sketch(
        count=count,
        mean_LD=torch.where(a.count > 0, a.mean_LD + share * difference_LD, b.mean_LD),
        trace_L=a.trace_L + b.trace_L + a.count * share * difference_LD.square().sum(1),
        buckets_LmD=buckets,
        signs_m=signs_m,
        heavy_LhD=heavy,
        index_h=index[choice.stored],
        score_h=score[choice.stored],
    )


def estimate_hsic(sketch: Sketch) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate the unbiased HSIC₁ of linear kernels between depths (Song et al. 2012); exact where every token is stored.

    Over pairs of buckets, and of a bucket and a heavy token, Σ_{i≠j} K_ij L_ij is estimated without bias, the mean removed
    afterwards; pairs of heavy tokens are exact, and so are the traces. Of the terms in Σ K_ii L_ii, which are small but for
    heavy tokens, those of the light tokens are taken as equal.

    Returns: By all buckets, and with one group of them left out at a time; in units of each depth's mean square
    deviation. NaN for fewer than 4 tokens, where HSIC₁ is undefined.
    """
    n, mean_LD, trace_L = float(sketch.count), sketch.mean_LD, sketch.trace_L
    if n < 4:
        undefined = mean_LD.new_full((NUM_GROUPS + 1, len(mean_LD), len(mean_LD)), torch.nan)
        return undefined[0], undefined[1:]
    # In units of the root mean square deviation of each depth: later depths may be many orders of magnitude larger.
    size = torch.where(trace_L > 0, trace_L / n, 1.0).sqrt()[:, None, None]
    heavy = torch.where(sketch.score_h[:, None] >= 0, sketch.heavy_LhD - mean_LD[:, None], 0.0) / size
    exact = _exact_terms(heavy, trace_L / size[:, 0, 0].square(), n, int((sketch.score_h >= 0).sum()))
    light = _centred_buckets(sketch, size)
    pairs_ggLL, mixed_gLL = _bucket_pairs(light), _heavy_bucket_pairs(heavy.to(light.dtype), light)
    # Two different tokens share a bucket with probability 1/m, and such pairs are not in the sum over i ≠ j buckets:
    # m / (m − 1) makes up for them.
    full = pairs_ggLL.sum((0, 1)) * (NUM_BUCKETS / (NUM_BUCKETS - 1)) + 2 * mixed_gLL.sum(0)
    # Without group g: the m' remaining buckets have a share m' (m' − 1) / m² of the pairs and m' / m of the tokens.
    remaining = NUM_BUCKETS - NUM_BUCKETS // NUM_GROUPS
    of_group = pairs_ggLL.sum(0) + pairs_ggLL.sum(1) - pairs_ggLL.diagonal().movedim(-1, 0)
    pairs = (pairs_ggLL.sum((0, 1)) - of_group) * (NUM_BUCKETS**2 / (remaining * (remaining - 1)))
    without = pairs + 2 * (mixed_gLL.sum(0) - mixed_gLL) * (NUM_BUCKETS / remaining)
    return (full + exact) / (n * (n - 3)), (without + exact) / (n * (n - 3))


def _centred_buckets(sketch: Sketch, size_L: torch.Tensor) -> torch.Tensor:
    """The buckets about the mean, Σ sign · (x − mean) / size, in float32: far more exact than a sketch is."""
    light_LmD = sketch.buckets_LmD.new_empty(sketch.buckets_LmD.shape, dtype=torch.float32)
    for light, bucket, mean_D, size in zip(
        light_LmD, sketch.buckets_LmD, sketch.mean_LD, size_L, strict=True
    ):
        light.copy_(torch.addr(bucket, sketch.signs_m, mean_D, alpha=-1).div_(size))
    return light_LmD


def _exact_terms(heavy_LhD: torch.Tensor, trace_L: torch.Tensor, n: float, num_heavy: int) -> torch.Tensor:
    """Pairs of heavy tokens, and Song's terms in the diagonals: Σ_{i≠j} − 2/(n−2) Σ_i K_ii L_ii + tr K tr L /((n−1)(n−2))."""
    gram = heavy_LhD @ heavy_LhD.mT
    diagonal = gram.diagonal(dim1=1, dim2=2)
    light_trace = trace_L - diagonal.sum(1)
    # Σ K_ii L_ii of the light tokens as if all were equally long: tr K tr L over their number.
    shared = diagonal @ diagonal.T + light_trace.outer(light_trace) / max(n - num_heavy, 1.0)
    flat = (gram - torch.diag_embed(diagonal)).flatten(1)
    return flat @ flat.T - 2.0 / (n - 2.0) * shared + trace_L.outer(trace_L) / ((n - 1.0) * (n - 2.0))


def _bucket_pairs(light_LmD: torch.Tensor) -> torch.Tensor:
    """Products of the Gram matrices of the buckets without their diagonals, by both groups of buckets: (g, g, L, L)."""
    gram = light_LmD @ light_LmD.mT
    gram.diagonal(dim1=1, dim2=2).zero_()  # the squares of the signs, which do not average out
    blocks = (
        gram.unflatten(2, (NUM_GROUPS, -1)).unflatten(1, (NUM_GROUPS, -1)).permute(1, 3, 0, 2, 4).flatten(3)
    )
    return (blocks @ blocks.mT).double()


def _heavy_bucket_pairs(heavy_LhD: torch.Tensor, light_LmD: torch.Tensor) -> torch.Tensor:
    """Products between heavy tokens and buckets, by the group of buckets: (g, L, L)."""
    blocks = (heavy_LhD @ light_LmD.mT).unflatten(2, (NUM_GROUPS, -1)).permute(2, 0, 1, 3).flatten(2)
    return (blocks @ blocks.mT).double()
