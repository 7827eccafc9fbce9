"""Does an operation that nobody knows add up what it takes? Tried at random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

MOST_OPERANDS = 2
ROUNDING = 64  # in units of the least difference that the result's numbers have


def factors_of_sum(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> dict[int, float] | None:
    """With which factors an operation adds its operands up, by their positions; None where it does something else.

    Never tried where processes work together: the operation may wait for the others.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None
    at = [n for n, argument in enumerate(args) if isinstance(argument, torch.Tensor)]
    alike = isinstance(result, torch.Tensor) and all(
        args[n].shape == result.shape and args[n].dtype == result.dtype for n in at
    )
    if not alike or not 0 < len(at) <= MOST_OPERANDS or not result.is_floating_point() or not result.numel():
        return None
    devices = [result.device] if result.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):  # it may draw random numbers
            return _factors(func, args, kwargs, result, at)
    except Exception:  # it takes no such numbers: nothing is known of it
        return None


def _factors(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: torch.Tensor, at: Sequence[int]
) -> dict[int, float] | None:
    def run(operands: Sequence[torch.Tensor]) -> torch.Tensor:
        given = dict(zip(at, operands, strict=True))
        return func(*(given.get(n, argument) for n, argument in enumerate(args)), **kwargs).double()

    generator = torch.Generator(result.device).manual_seed(0)
    tried = [torch.empty_like(result).normal_(generator=generator) for _ in at]
    zeros = [torch.zeros_like(result) for _ in at]
    factors = []
    for n, numbers in enumerate(tried):
        made = run([*zeros[:n], numbers, *zeros[n + 1 :]])
        factors.append(float((made * numbers).sum() / numbers.double().square().sum()))
    bound = ROUNDING * torch.finfo(result.dtype).eps
    for operands in (zeros, tried, [2 * numbers.flip(0) for numbers in tried], [args[n] for n in at]):
        total = sum(factor * of.double() for factor, of in zip(factors, operands, strict=True))
        size = max(float(of.abs().max()) for of in operands)
        if not float((run(operands) - total).abs().max()) <= bound * max(size, bound):
            return None
    return {n: factor for n, factor in zip(at, factors, strict=True) if factor} or None
