"""Which of the tensors that a connection computes are its weights? Those from which its output can be recomputed.

No family's formula is repeated here: a tensor is the weight because it explains the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from depthscope.probes.connections.coefficients import relative_error, spread, tolerance
from depthscope.probes.model.hooks import without_frames
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.model.user_modes import compute_dtype

T = TypeVar("T")
Explanation: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, slice))

# An error of so many roundings is none, so that no further candidate is tried; a heuristic.
EXACT = 4
# Heuristic: enough to select the weights among the watched tensors. The proof looks at more tokens, and at the next state.
SELECTING_TOKENS = 64
# As many tell whether the tensor at the place of the forward before is still the weights: it is one candidate, not many.
CONFIRMING_TOKENS = 16


@dataclass
class WeightPlace:
    """Which of the candidates explained an output in the forward before, among how many; among none where that is not known.

    Parameters
    ----------
    among, position : int
        Number of candidates, and which one it was.
    error : float
        How far it was from explaining it.
    """

    among: int = 0
    position: int = 0
    error: float = 0.0


class Watch(TorchFunctionMode):
    """Keep every tensor of some shapes that passes through a torch function while the mode is on.

    A function mode sees the tensors that the module's own code handles; a dispatch mode, which runs below autograd, would also
    see every intermediate of torch's own functions.

    Parameters
    ----------
    accept : callable
        ``accept(shape) -> bool``.
    """

    def __init__(self, accept: Callable[[tuple[int, ...]], bool]):
        super().__init__()
        self._accept = accept
        self._accepted: dict[tuple[int, ...], bool] = {}  # this is asked at every function of the module
        # By id, which stays unique as long as the tensors are stored here
        self.seen: dict[int, torch.Tensor] = {}
        self._error: Exception | None = None  # why no more is kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function and look at what goes in and comes out."""
        result = func(*args, **kwargs) if kwargs else func(*args)
        # A mode of the user's must not see that shapes are read.
        with torch._C.DisableTorchFunction():
            if self._error is None:
                try:
                    self._look_at(args, result)
                except (
                    Exception,
                    GeneratorExit,
                ) as error:  # it must not reach the module, whose function has run
                    self._error = without_frames(error)
                    self.seen = {}
        return result

    def _look_at(self, args: Any, result: Any) -> None:
        # This runs at every function of the module, and most arguments are tensors or numbers: no recursion for these.
        for value in (*args, result):
            kind = type(value)
            if kind is torch.Tensor or isinstance(value, torch.Tensor):
                self._look_at_tensor(value)
            elif kind not in PLAIN:
                for tensor in tensors_in(value):
                    self._look_at_tensor(tensor)

    def _look_at_tensor(self, tensor: torch.Tensor) -> None:
        shape = tensor.shape
        accepted = self._accepted.get(shape)
        if accepted is None:
            accepted = self._accepted[shape] = self._accept(tuple(shape))
        if accepted:
            self.seen[id(tensor)] = tensor

    def floating(self) -> list[torch.Tensor]:
        """The floating ones of the tensors that passed, the last one first: what is applied is computed last.

        Raises
        ------
        Exception
            What looking at them raised.
        """
        if self._error is not None:
            raise self._error
        return [tensor.detach() for tensor in reversed(self.seen.values()) if tensor.is_floating_point()]


def explaining(
    candidates: Sequence[tuple[T, Explanation]], *goal: torch.Tensor, place: WeightPlace | None = None
) -> T | None:
    """The candidate whose explanation comes nearest to a goal, if it comes near enough; the search ends at an exact one.

    ``candidates``: what to return, and a function from token indices to what it explains at these.
    ``*goal``: (B, T, …); several are joined along their third axis.
    ``place``: which one it was in the forward before: as many candidates again, and the same code has run, so that this
    one is taken where it still explains the goal as well. It is noted for the next forward.
    Returns: None where the best relative error is above the tolerance of the goal's precision.
    """
    exact = EXACT * torch.finfo(goal[0].dtype).eps
    enough = tolerance(compute_dtype(goal[0]))
    if place is not None and place.among == len(candidates) > 0:
        result, explain = candidates[place.position]
        if _still_explains(explain, goal, min(max(exact, 4 * place.error), enough)):
            return result
    few, wanted = _goal(goal, SELECTING_TOKENS)
    best, least, at = None, math.inf, 0
    for position, (result, explain) in enumerate(candidates):
        error = relative_error(explain(few) - wanted, wanted)
        if error < least:
            best, least, at = result, error, position
        if error <= exact:
            break
    if least > enough:
        return None
    if place is not None:
        place.among, place.position, place.error = len(candidates), at, least
    return best


def _still_explains(explain: Explanation, goal: Sequence[torch.Tensor], limit: float) -> bool:
    """Whether an explanation of the forward before holds in this one; all on the device, which is waited for once."""
    few, wanted = _goal(goal, CONFIRMING_TOKENS)
    size = torch.linalg.vector_norm(wanted)
    error = torch.linalg.vector_norm(explain(few) - wanted)
    # A goal of zeros, as of padding, is explained by whatever reads it.
    return bool((error <= limit * size) & (size > 0))


def _goal(goal: Sequence[torch.Tensor], most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of some tokens, and a goal at these."""
    batch, tokens = goal[0].shape[:2]
    few = spread(batch * tokens, most).to(goal[0].device)
    return few, torch.cat([few_of(part, few) for part in goal], dim=1) if goal[1:] else few_of(goal[0], few)


def mixing(matrix: torch.Tensor, streams: torch.Tensor) -> Explanation:
    """The product of a matrix (B, T, M, N) with the streams (B, T, N, D), at some tokens."""
    return lambda few: few_of(matrix, few) @ few_of(streams, few)


def few_of(tensor: torch.Tensor, few: torch.Tensor) -> torch.Tensor:
    """Some tokens of a tensor (B, T, …), in float64; two indices, so that a strided tensor is not copied first."""
    tokens = tensor.shape[1]
    return tensor[few // tokens, few % tokens].double()
