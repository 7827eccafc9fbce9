"""Sums that tell how alike depths are: a signed row sketch, the same for every depth, and the heaviest tokens themselves.

Shapes: L depth, t the tokens of a forward, D feature, m bucket, h heavy token, g group of buckets. Every token goes, with a
random sign, into one of m buckets; both follow from its sequence and position, so that every depth, batch and process agrees.
The heaviest tokens, few of which can hold most of the energy, stay out of the buckets as they are; one that a heavier token
displaces goes to its bucket. What is held is the same in any order of merging.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from probes.moments import Block, means

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
    """Where the tokens of some forwards go, at every depth alike."""

    lengths: tuple[int, ...]  # of the forwards
    real_t: torch.Tensor
    count_k: torch.Tensor  # real tokens of each forward, float64
    sign_t: torch.Tensor  # float32; 0 on padding
    bucket_t: torch.Tensor  # the one behind the last for what is in no bucket
    signs_km: torch.Tensor  # of each forward, float64
    top_h: torch.Tensor
    forward_h: torch.Tensor
    index_h: torch.Tensor
    score_h: torch.Tensor  # negative where padding fills a place


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


def placed(
    index_t: torch.Tensor, real_t: torch.Tensor, score_t: torch.Tensor, lengths: tuple[int, ...]
) -> Places:
    """Choose the heaviest tokens of some forwards, and the buckets of the others.

    Parameters
    ----------
    index_t, real_t, score_t : Tensor
        As `token_index` and `scores` give them, one forward after another.
    lengths : tuple of int
        How many tokens each forward has.

    Returns
    -------
    Places
    """
    score_h, top = score_t.topk(min(HEAVY, len(score_t)))
    bucket, sign = _hashed(index_t)
    sign = torch.where(real_t, sign, 0.0)
    bucket = torch.where(real_t, bucket, BUCKETS).index_fill(0, top, BUCKETS)
    forward_t = torch.arange(len(lengths), device=top.device).repeat_interleave(
        torch.tensor(lengths, device=top.device), output_size=len(score_t)
    )
    signs = sign.new_zeros(len(lengths), BUCKETS + 1, dtype=torch.float64)
    signs_km = signs.index_put_((forward_t, bucket), sign.double(), accumulate=True)[:, :BUCKETS]
    count_k = torch.stack([real.sum() for real in real_t.split(lengths)]).double()
    return Places(
        lengths, real_t, count_k, sign, bucket, signs_km, top, forward_t[top], index_t[top], score_h
    )


class Growing:
    """A sketch to which some forwards are added, depth by depth.

    Parameters
    ----------
    held : Sketch or None
        Of earlier tokens; its numbers of every depth are written, and handed on.
    places : Places
        Where the tokens go.
    num_depths, width : int
        Of the blocks.
    """

    def __init__(self, held: Sketch | None, places: Places, num_depths: int, width: int) -> None:
        self._held, self._places = held, places
        new = places.signs_km.new_zeros
        count, signs_m = places.count_k.sum(), places.signs_km.sum(0)
        score, index = places.score_h, places.index_h
        if held is not None:
            count, signs_m = count + held.count, signs_m + held.signs_m
            score, index = torch.cat([held.score_h, score]), torch.cat([held.index_h, index])
        self._choice = choice = _choose(score, index)
        signs_m.index_add_(0, choice.bucket, choice.sign)
        if held is None:
            of_all = new(num_depths, width), new(num_depths), new(num_depths, BUCKETS, width)
        else:
            of_all = held.mean_LD, held.trace_L, held.buckets_LmD
        full = held is not None and held.heavy_LhD.shape[1] == len(choice.kept)
        heavy = held.heavy_LhD if full else new(num_depths, len(choice.kept), width)
        self.sketch = Sketch(count, *of_all, signs_m, heavy, index[choice.kept], score[choice.kept])

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
        places, near, home = self._places, block.signed_tD.device, self.sketch.signs_m.device
        bucket, top, forward = (x.to(near) for x in (places.bucket_t, places.top_h, places.forward_h))
        light = block.signed_tD.new_zeros(BUCKETS + 1, block.signed_tD.shape[1])
        light = light.index_add_(0, bucket, block.signed_tD)[:BUCKETS].to(home)
        sign_h, size = block.sign_t[top, None].double(), block.size.to(home)
        heavy = block.signed_tD[top] * sign_h * block.size + sign_h.abs() * block.shift_kD[forward]
        heavy, buckets = heavy.to(home), self.sketch.buckets_LmD[depth]
        if self._held is not None:
            heavy = torch.cat([self._held.heavy_LhD[depth], heavy])
        buckets.addcmul_(light, size).addmm_(places.signs_km.T, block.shift_kD.to(home))
        _settle(heavy, self._choice, buckets, self.sketch.heavy_LhD[depth])
        self._add_spread(depth, block, square_k)

    def _add_spread(self, depth: int, block: Block, square_k: torch.Tensor) -> None:
        """Add to the mean and to Σ ‖x − mean‖²."""
        mean_D, trace = self.sketch.mean_LD[depth], self.sketch.trace_L[depth]
        near = block.total_kD.device
        held = (None, None) if self._held is None else (self._held.count.to(near), mean_D.to(near))
        counts_k, means_kD, new_D = means(*held, block)
        inside = square_k - block.total_kD.square().sum(1) / block.count_k.clamp_min(1)
        between = counts_k * (means_kD - new_D).square().sum(1)
        trace += (inside.sum() + between.sum()).to(trace.device)
        mean_D.copy_(new_D)


class Choice(NamedTuple):
    """Which of some tokens stay as they are, and the buckets and signs of the others; padding has sign 0."""

    kept: torch.Tensor
    left: torch.Tensor
    bucket: torch.Tensor
    sign: torch.Tensor


def _choose(score: torch.Tensor, index: torch.Tensor) -> Choice:
    order = score.argsort(descending=True, stable=True)
    kept, left = order[:HEAVY], order[HEAVY:]
    bucket, sign = _hashed(index[left])
    return Choice(kept, left, bucket, torch.where(score[left] >= 0, sign, 0.0).double())


def _settle(tokens: torch.Tensor, choice: Choice, buckets_mD: torch.Tensor, heavy_hD: torch.Tensor) -> None:
    """Write the chosen tokens of one depth, and add the others to the buckets."""
    torch.index_select(tokens, 0, choice.kept, out=heavy_hD)
    buckets_mD.index_add_(0, choice.bucket, tokens[choice.left] * choice.sign[:, None])


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
