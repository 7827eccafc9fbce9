"""What does torch give of a state that lies in memory? Norms, directions and sums, in blocks that fit into the cache.

Shapes: B batch, T token, t the tokens of one block, N stream, D feature.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

BLOCK_NUMBERS_CPU = 2**17  # a block and the one of the depth before fit into a second-level cache of 2 MiB
BLOCK_NUMBERS_GPU = 2**24  # no such cache to fit into, and launching many small kernels would cost more
MAX_BLOCK_TOKENS = 4096  # they are added in float32, whose error grows with their number
TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


class BlockStatistics(NamedTuple):
    """Norms and sums of some tokens of a state; live sums have the mean over several streams before these."""

    norm_tN: torch.Tensor
    largest_tN: torch.Tensor
    feature_sum_ND: torch.Tensor
    unit_sum_ND: torch.Tensor
    cosine_tN: torch.Tensor | None
    unit_tND: torch.Tensor


class Profile(NamedTuple):
    """Norms and sums of all tokens of a state."""

    norm_tN: torch.Tensor
    largest_tN: torch.Tensor
    feature_sum_ND: torch.Tensor
    unit_sum_ND: torch.Tensor
    cosine_sum_N: torch.Tensor | None


def blocks_of(state_BTND: torch.Tensor, mask_BT: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """A state in float32, some tokens at a time (t, N, D), zero on padding. Read-only: it may be the model's own tensor."""
    _, T, N, D = state_BTND.shape
    numbers = BLOCK_NUMBERS_CPU if state_BTND.device.type == "cpu" else BLOCK_NUMBERS_GPU
    tokens = min(max(numbers // (N * D), 1), MAX_BLOCK_TOKENS)
    # Batch and token axes are flattened for some sequences at a time: where the layout "(B N) T D" makes the state a
    # strided view, flattening copies, and the full state at once would not fit into the cache.
    sequences = max(tokens // T, 1)
    masks = itertools.repeat(None) if mask_BT is None else _split_tokens(mask_BT, sequences, tokens)
    for x, real in zip(_split_tokens(state_BTND.detach(), sequences, tokens), masks, strict=False):
        yield x.float() if real is None else _without_padding(x, real)


def _split_tokens(tensor_BT: torch.Tensor, sequences: int, tokens: int) -> Iterator[torch.Tensor]:
    for rows in tensor_BT.split(sequences):
        yield from rows.flatten(0, 1).split(tokens)


def _without_padding(x_tND: torch.Tensor, real_t: torch.Tensor) -> torch.Tensor:
    """A float32 copy with zeros on padding."""
    x = x_tND.to(torch.float32, copy=True)
    # By a bit mask (all ones or all zeros): NaN times zero is NaN, and masked_fill takes five times as long.
    x.view(torch.int32).bitwise_and_(real_t.int().neg()[:, None, None])
    return x


def stream_cosines(x_tND: torch.Tensor) -> torch.Tensor:
    """Cosines between the streams of every token, in float64: 1 − cosine tells whether streams have begun to part."""
    x = x_tND.double()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit = x / norm.where(norm > 0, 1.0)
    return unit @ unit.mT


def block_statistics(
    x_tND: torch.Tensor,
    previous_unit: torch.Tensor | None,
    spare: torch.Tensor | None,
    *,
    is_exact: bool = False,
) -> BlockStatistics:
    """Statistics of a block; ``previous_unit`` is overwritten, and so is ``spare`` where its shape fits."""
    scaled, largest, size = scaled_tokens(
        x_tND, spare if spare is not None and spare.shape == x_tND.shape else None
    )
    unit = scaled.mul_(size.clamp_min(TINY).reciprocal())  # zero tokens stay zero
    cosine = None if previous_unit is None else previous_unit.mul_(unit).sum(-1)
    norm = largest.double().mul_(size)
    dtype = torch.float64 if is_exact else None
    feature_sum, unit_sum = x_tND.sum(0, dtype=dtype), unit.sum(0, dtype=dtype)
    return BlockStatistics(norm.squeeze(-1), largest.squeeze(-1), feature_sum, unit_sum, cosine, unit)


def scaled_tokens(
    x_tND: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every token over its largest absolute value, that value, and the norm of what remains."""
    # Squares of float32 underflow below 1e-23 and overflow above 1e19; after scaling they lie between 0 and 1.
    largest = torch.maximum(x_tND.amax(-1, keepdim=True), x_tND.amin(-1, keepdim=True).neg_())
    scaled = torch.mul(x_tND, largest.clamp(TINY, HUGE).reciprocal_(), out=out)
    return scaled, largest, torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)


def joined(blocks: list[BlockStatistics]) -> Profile:
    """The statistics of all blocks of a state."""
    cosines = [block.cosine_tN for block in blocks if block.cosine_tN is not None]
    return Profile(
        torch.cat([block.norm_tN for block in blocks]),
        torch.cat([block.largest_tN for block in blocks]),
        _sum_exactly([block.feature_sum_ND for block in blocks]),
        _sum_exactly([block.unit_sum_ND for block in blocks]),
        torch.cat(cosines).sum(0, dtype=torch.float64) if cosines else None,
    )


def _sum_exactly(sums_ND: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(sums_ND).sum(0, dtype=torch.float64)
