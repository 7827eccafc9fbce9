"""The tensors that pass while a connection runs, and which of them explains what it gave.

No family's formula is repeated: what explains the module's output is its weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from depthscope.probes.connections.coefficients import relative_error, spread, tolerance
from depthscope.probes.model.autocast import compute_dtype
from depthscope.probes.model.tensors import tensors_in

T = TypeVar("T")
Explanation: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

EXACT = 4  # an error of so many roundings is none
SELECTING_TOKENS = 64  # tokens that tell which of the watched tensors are the weights; the proof looks again


class Watch(TorchFunctionMode):
    """Keep every tensor of some shapes that passes through torch functions while the mode is on.

    Parameters
    ----------
    accept : callable
        ``accept(shape) -> bool``.
    """

    def __init__(self, accept: Callable[[tuple[int, ...]], bool]):
        super().__init__()
        self._accept = accept
        self.seen: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function and look at what goes in and comes out."""
        result = func(*args, **(kwargs or {}))
        for value in (*args, result):
            for tensor in (value,) if isinstance(value, torch.Tensor) else tensors_in(value):
                if self._accept(tuple(tensor.shape)):
                    self.seen[id(tensor)] = tensor
        return result

    def floating(self) -> list[torch.Tensor]:
        """The floating ones of the tensors that were seen, the last one first: what is applied is computed last."""
        return [tensor.detach() for tensor in reversed(self.seen.values()) if tensor.is_floating_point()]


def explaining(candidates: Iterable[tuple[T, Explanation]], *goal: torch.Tensor) -> T | None:
    """The candidate whose explanation comes nearest to a goal, where it comes near enough; the first that is exact ends it.

    Parameters
    ----------
    candidates : iterable of (result, explanation)
        What to return, and a function from token indices to what it explains at these.
    *goal : Tensor
        (B, T, …); several are joined along their third axis.

    Returns
    -------
    object or None
    """
    batch, tokens = goal[0].shape[:2]
    few = spread(batch * tokens, SELECTING_TOKENS).to(goal[0].device)
    wanted = torch.cat([few_of(part, few) for part in goal], dim=1) if goal[1:] else few_of(goal[0], few)
    exact = EXACT * torch.finfo(goal[0].dtype).eps
    best, least = None, math.inf
    for result, explain in candidates:
        error = relative_error(explain(few) - wanted, wanted)
        if error < least:
            best, least = result, error
        if error <= exact:
            break
    return best if least <= tolerance(compute_dtype(goal[0])) else None


def mixing(matrix: torch.Tensor, streams: torch.Tensor) -> Explanation:
    """What a matrix (B, T, M, N) makes of the streams (B, T, N, D), at some tokens."""
    return lambda few: few_of(matrix, few) @ few_of(streams, few)


def few_of(tensor: torch.Tensor, few: torch.Tensor) -> torch.Tensor:
    """Some tokens of a tensor (B, T, …), in float64; streams that lie apart are not all copied for it."""
    tokens = tensor.shape[1]
    return tensor[few // tokens, few % tokens].double()
