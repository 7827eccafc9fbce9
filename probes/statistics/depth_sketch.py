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

from depthscope.probes.statistics.second_moments import Block, means

BUCKETS = 512
HEAVY = 128
GROUPS = 16  # of buckets; leaving each out in turn tells the error
LOW = 0xFFFFFFFF
GOLDEN = (
    0x9E3779B1  # odd, 2³² over the golden ratio: numbers of sequences that are near each other lie far apart
)


class Sketch(NamedTuple):
    """What is kept of all tokens seen, at some depths of one width."""

    count: torch.Tensor
    mean_LD: torch.Tensor
    trace_L: torch.Tensor  # Σ ‖x − mean‖²
    buckets_LmD: torch.Tensor
    signs_m: torch.Tensor
    heavy_LhD: torch.Tensor
    index_h: torch.Tensor
    score_h: torch.Tensor  # negative where padding fills a place


class Places(NamedTuple):
    """Where the tokens of a forward go, at every depth alike."""

    real_t: torch.Tensor
    count: torch.Tensor  # of real tokens, float64
    sign_t: torch.Tensor  # float32; 0 on padding
    bucket_t: torch.Tensor  # of every token
    top_h: torch.Tensor  # the heaviest
    index_h: torch.Tensor
    score_h: torch.Tensor  # negative where padding fills a place


def token_index(sequences: torch.Tensor, tokens: int) -> torch.Tensor:
    """Numbers of tokens by their sequence and position; distinct for the first 10⁹ tokens at least.

    Parameters
    ----------
    sequences : Tensor
        Indices of the sequences.
    tokens : int
        How many tokens are in each.

    Returns
    -------
    Tensor
        (sequences × tokens,), int64 below 2³².
    """
    start = (sequences & LOW) * GOLDEN
    return ((start[:, None] + torch.arange(tokens, device=start.device)) & LOW).flatten()


def scores(norm_Lt: torch.Tensor, real_t: torch.Tensor) -> torch.Tensor:
    """How heavy tokens are: the length over the mean one of the forward, at the depth where that is most.

    Parameters
    ----------
    norm_Lt : Tensor
        Length of every token of a forward, its mean removed.
    real_t : Tensor
        False on what does not count.

    Returns
    -------
    Tensor
        (t,), negative on what does not count.
    """
    norm_Lt = torch.where(real_t, norm_Lt, 0.0)
    mean_L = norm_Lt.sum(1, keepdim=True) / real_t.sum().clamp_min(1)
    return torch.where(real_t, (norm_Lt / torch.where(mean_L > 0, mean_L, 1.0)).amax(0), -1.0)


def placed(index_t: torch.Tensor, real_t: torch.Tensor, score_t: torch.Tensor) -> Places:
    """Find the heaviest tokens of a forward, and the bucket and the sign of each.

    Parameters
    ----------
    index_t, real_t, score_t : Tensor
        As `token_index` and `scores` give them.

    Returns
    -------
    Places
    """
    score_h, top = score_t.topk(min(HEAVY, len(score_t)))
    bucket, sign = hashed(index_t)
    sign_t = torch.where(real_t, sign, 0.0)
    return Places(real_t, real_t.sum().double(), sign_t, bucket, top, index_t[top], score_h)


class Growing:
    """A sketch to which some forwards are added, depth by depth.

    Parameters
    ----------
    held : Sketch or None
        Of earlier tokens; its numbers of every depth are written, and handed on.
    places : sequence of Places
        Where the tokens of each forward go.
    num_depths, width : int
        Of the blocks.
    """

    def __init__(self, held: Sketch | None, places: Sequence[Places], num_depths: int, width: int) -> None:
        self._held, self._places = held, places
        self._forward_h = torch.cat([torch.full_like(of.top_h, k) for k, of in enumerate(places)])
        score, index = torch.cat([of.score_h for of in places]), torch.cat([of.index_h for of in places])
        # Of all that may be heavy only the heaviest are treated as such: the others go into their buckets in float32.
        score, self._top = score.topk(min(HEAVY, len(score)))
        index = index[self._top]
        self._buckets = self._without_heavy()
        self._signs_km = torch.stack(
            [_signs(of, bucket) for of, bucket in zip(places, self._buckets, strict=True)]
        )
        count, signs_m = torch.stack([of.count for of in places]).sum(), self._signs_km.sum(0)
        if held is not None:
            count, signs_m = count + held.count, signs_m + held.signs_m
            score, index = torch.cat([held.score_h, score]), torch.cat([held.index_h, index])
        self._choice = choice = _choose(score, index)
        signs_m.index_add_(0, choice.bucket, choice.sign)
        new = signs_m.new_zeros
        if held is None:
            of_all = new(num_depths, width), new(num_depths), new(num_depths, BUCKETS, width)
        else:
            of_all = held.mean_LD, held.trace_L, held.buckets_LmD
        heavy = new(num_depths, len(choice.kept), width) if held is None else held.heavy_LhD
        if heavy.shape[1] < len(choice.kept):
            heavy = new(num_depths, len(choice.kept), width)
        self.sketch = Sketch(count, *of_all, signs_m, heavy, index[choice.kept], score[choice.kept])

    def _without_heavy(self) -> list[torch.Tensor]:
        """The buckets of each forward's tokens, the one behind the last for the heaviest."""
        is_top = torch.zeros_like(self._forward_h, dtype=torch.bool).index_fill_(0, self._top, True)
        tops = is_top.split([len(of.top_h) for of in self._places])
        return [
            of.bucket_t.index_copy(0, of.top_h, torch.where(top, BUCKETS, of.bucket_t[of.top_h]))
            for of, top in zip(self._places, tops, strict=True)
        ]

    def add(self, depth: int, block: Block, square_k: torch.Tensor) -> None:
        """Add the tokens of one depth, which may lie elsewhere: a model may be spread over devices.

        Parameters
        ----------
        depth : int
            Its position in the sketch.
        block : Block
            Its tokens.
        square_k : Tensor
            Σ ‖x − shift‖² of each forward, float64.
        """
        near, home = block.shift_kD.device, self.sketch.signs_m.device
        light = block.signed[0].new_zeros(BUCKETS + 1, block.signed[0].shape[1])
        for bucket, signed_tD in zip(self._buckets, block.signed, strict=True):
            light.index_add_(0, bucket.to(near), signed_tD)
        heavy, buckets = self._heavy(block).to(home), self.sketch.buckets_LmD[depth]
        if self._held is not None:
            heavy = torch.cat([self._held.heavy_LhD[depth], heavy])
        buckets.addcmul_(light[:BUCKETS].to(home), block.size.to(home))
        buckets.addmm_(self._signs_km.T, block.shift_kD.to(home))
        _settle(heavy, self._choice, buckets, self.sketch.heavy_LhD[depth])
        self._add_spread(depth, block, square_k)

    def _heavy(self, block: Block) -> torch.Tensor:
        """The heaviest tokens of a block as they are, float64; 0 on padding."""
        near = block.shift_kD.device
        tops = [of.top_h.to(near) for of in self._places]
        top, forward_h = self._top.to(near), self._forward_h.to(near)[self._top.to(near)]
        signed_hD = torch.cat([x_tD[h] for x_tD, h in zip(block.signed, tops, strict=True)])[top]
        sign_h = torch.cat([sign_t[h] for sign_t, h in zip(block.signs, tops, strict=True)])[top, None]
        shift_hD = block.shift_kD[forward_h] * sign_h.abs()
        return shift_hD.addcmul_(signed_hD * sign_h, block.size)

    def _add_spread(self, depth: int, block: Block, square_k: torch.Tensor) -> None:
        """Add to the mean and to Σ ‖x − mean‖²."""
        mean_D, trace = self.sketch.mean_LD[depth], self.sketch.trace_L[depth]
        near = block.total_kD.device
        count = None if self._held is None else self._held.count.to(near)
        counts_k, means_kD, new_D = means(count, mean_D.to(near), block)
        inside = square_k - block.total_kD.square().sum(1) / block.count_k.clamp_min(1)
        between = counts_k * (means_kD - new_D).square().sum(1)
        trace += (inside.sum() + between.sum()).to(trace.device)
        mean_D.copy_(new_D)


def _signs(of: Places, bucket_t: torch.Tensor) -> torch.Tensor:
    """The signed number of tokens of a forward in each bucket, float64."""
    signs = of.count.new_zeros(BUCKETS + 1)
    return signs.index_add_(0, bucket_t, of.sign_t.double())[:BUCKETS]


class Choice(NamedTuple):
    """Which of some tokens stay as they are, and the buckets and signs of the others; padding has sign 0."""

    kept: torch.Tensor
    left: torch.Tensor
    bucket: torch.Tensor
    sign: torch.Tensor


def _choose(score: torch.Tensor, index: torch.Tensor) -> Choice:
    order = score.argsort(descending=True, stable=True)
    kept, left = order[:HEAVY], order[HEAVY:]
    bucket, sign = hashed(index[left])
    return Choice(kept, left, bucket, torch.where(score[left] >= 0, sign, 0.0).double())


def _settle(tokens: torch.Tensor, choice: Choice, buckets_mD: torch.Tensor, heavy_hD: torch.Tensor) -> None:
    """Write the chosen tokens of one depth, and add the others to the buckets."""
    torch.index_select(tokens, 0, choice.kept, out=heavy_hD)
    buckets_mD.index_add_(0, choice.bucket, tokens[choice.left] * choice.sign[:, None])


def hashed(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bucket and sign of each token: the hash of ``row_sketch`` in benchmarks/analysis/sketches.py.

    Parameters
    ----------
    index : Tensor
        Numbers of tokens.

    Returns
    -------
    bucket, sign : Tensor
        int64, and 1 or −1 in float32.
    """
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
    choice = _choose(score, index)
    buckets = a.buckets_LmD + b.buckets_LmD
    heavy = a.heavy_LhD.new_empty(len(a.heavy_LhD), len(choice.kept), a.heavy_LhD.shape[2])
    for depth, tokens in enumerate(zip(a.heavy_LhD, b.heavy_LhD, strict=True)):
        _settle(torch.cat(tokens), choice, buckets[depth], heavy[depth])
    signs_m = (a.signs_m + b.signs_m).index_add_(0, choice.bucket, choice.sign)
    count, apart_LD = a.count + b.count, b.mean_LD - a.mean_LD
    share = b.count / count.clamp_min(1)
    return Sketch(
        count=count,
        mean_LD=torch.where(a.count > 0, a.mean_LD + share * apart_LD, b.mean_LD),
        trace_L=a.trace_L + b.trace_L + a.count * share * apart_LD.square().sum(1),
        buckets_LmD=buckets,
        signs_m=signs_m,
        heavy_LhD=heavy,
        index_h=index[choice.kept],
        score_h=score[choice.kept],
    )


def hsic(sketch: Sketch) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimates of the unbiased HSIC₁ of linear kernels between depths; exact where every token is kept as it is.

    Over pairs of buckets, and of a bucket and a heavy token, Σ_{i≠j} K_ij L_ij is estimated without bias, the mean removed
    afterwards; pairs of heavy tokens are exact, and so are the traces. Of the terms in Σ K_ii L_ii, which are small but for
    heavy tokens, the light ones are taken as equal.

    Parameters
    ----------
    sketch : Sketch
        Of all tokens.

    Returns
    -------
    whole_LL, without_gLL : Tensor
        By all buckets, and with a group of them left out at a time; in units of each depth's mean square deviation. NaN for
        fewer than 4 tokens.
    """
    n, mean_LD, trace_L = float(sketch.count), sketch.mean_LD, sketch.trace_L
    if n < 4:
        nothing = mean_LD.new_full((GROUPS + 1, len(mean_LD), len(mean_LD)), torch.nan)
        return nothing[0], nothing[1:]
    size = torch.where(trace_L > 0, trace_L / n, 1.0).sqrt()[:, None, None]
    heavy = torch.where(sketch.score_h[:, None] >= 0, sketch.heavy_LhD - mean_LD[:, None], 0.0) / size
    own = _own_terms(heavy, trace_L / size[:, 0, 0].square(), n, int((sketch.score_h >= 0).sum()))
    light = _centred(sketch, size)
    pairs_ggLL, mixed_gLL = _pairs(light), _mixed(heavy.to(light.dtype), light)
    kept = BUCKETS - BUCKETS // GROUPS
    whole = pairs_ggLL.sum((0, 1)) * (BUCKETS / (BUCKETS - 1)) + 2 * mixed_gLL.sum(0)
    lost = pairs_ggLL.sum(0) + pairs_ggLL.sum(1) - pairs_ggLL.diagonal().movedim(-1, 0)
    pairs = (pairs_ggLL.sum((0, 1)) - lost) * (BUCKETS**2 / (kept * (kept - 1)))
    without = pairs + 2 * (mixed_gLL.sum(0) - mixed_gLL) * (BUCKETS / kept)
    return (whole + own) / (n * (n - 3)), (without + own) / (n * (n - 3))


def _centred(sketch: Sketch, size_L: torch.Tensor) -> torch.Tensor:
    """The buckets about the mean, in float32: that is far nearer than a sketch is."""
    light_LmD = sketch.buckets_LmD.new_empty(sketch.buckets_LmD.shape, dtype=torch.float32)
    for light, bucket, mean_D, size in zip(
        light_LmD, sketch.buckets_LmD, sketch.mean_LD, size_L, strict=True
    ):
        light.copy_(torch.addr(bucket, sketch.signs_m, mean_D, alpha=-1).div_(size))
    return light_LmD


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
    return (blocks @ blocks.mT).double()


def _mixed(heavy_LhD: torch.Tensor, light_LmD: torch.Tensor) -> torch.Tensor:
    """Products between heavy tokens and buckets, by the group of buckets: (g, L, L)."""
    blocks = (heavy_LhD @ light_LmD.mT).unflatten(2, (GROUPS, -1)).permute(2, 0, 1, 3).flatten(2)
    return (blocks @ blocks.mT).double()
