"""Which blocks of a chain hold the weights of another one in memory of their own? Found by numbers, never by names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from depthscope.probes.model.modules import module_paths
from depthscope.probes.run.initial_weights import SAMPLED, is_readable
from depthscope.probes.structure.chain import Chain


def equal_blocks(model: nn.Module, chain: Chain) -> dict[str, Any]:
    """Blocks whose weights are all those of an earlier block, and not shared with it.

    Returns: ``equal_blocks``, the numbers of these blocks and of those that they equal; empty where there is none.
    """
    known = dict(module_paths(model))
    blocks = {n: list(known[path].parameters()) for n, path in enumerate(chain.blocks) if path in known}
    groups: dict[Any, list[int]] = {}
    with torch.no_grad():
        for number, weights in blocks.items():
            if weights and all(is_readable(weight) for weight in weights):
                groups.setdefault(_sample(weights), []).append(number)
        found = {
            number
            for same in groups.values()
            for first, second in pairwise(same)
            if _are_equal(blocks[first], blocks[second])
            for number in (first, second)
        }
    return {"equal_blocks": sorted(found)} if found else {}


def _sample(weights: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """What equal blocks have in common: their shapes, and some numbers of the largest weight."""
    largest = max(weights, key=torch.Tensor.numel).flatten()
    numbers = largest[:: max(1, largest.numel() // SAMPLED)].float()
    return tuple(weight.shape for weight in weights), float(numbers.sum()), float(numbers.square().sum())


def _are_equal(weights: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Whether all numbers are the same, some were drawn, and the memory is not the same."""
    return (
        all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))
        and any(bool(one.amin() < one.amax()) for one in weights)
        and not any(one is other for one, other in zip(weights, others, strict=True))
    )
