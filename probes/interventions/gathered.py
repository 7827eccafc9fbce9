"""What attention gathers on the way to a state, the weighted sums of the values, is changed where it is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

import torch

from depthscope.probes.interventions.errors import InterventionError
from depthscope.probes.interventions.state_operations import StateOperations
from depthscope.probes.session.attention import AttentionWatch


class Gathered(NamedTuple):
    """What attention gathers between the state before a depth and the state at it, as a place of an edit."""

    depth: int


class WithoutAttention:
    """Zeros in place of what is gathered on the way to some depths of one chain, in one forward.

    ``depths``: with the state before each of them and at it, the forward must show both.
    ``shown``: the depths of the chain whose states are made by an operation that is met again.
    """

    def __init__(
        self, operations: StateOperations, number: int, depths: Collection[int], shown: Collection[int]
    ) -> None:
        for depth in depths:
            if not {depth - 1, depth} <= set(shown):
                raise InterventionError(
                    f"depth {depth}: the state before it or at it is made by no operation that torch shows, so that it is not "
                    "known which attention leads to it"
                )
        self._operations, self._number, self._depths = operations, number, depths
        self._silenced: Counter[int] = Counter()
        watch = AttentionWatch(
            torch.zeros(0, dtype=torch.long), 1, heads_follow=lambda: True, gathered=self._gathered
        )
        if depths:
            operations.listen(watch)

    def _gathered(self, result: torch.Tensor) -> None:
        made = (depth for number, depth in self._operations.met if number == self._number)
        depth = 1 + max(made, default=-1)
        if depth in self._depths:
            result.zero_()
            self._silenced[depth] += 1

    def require_found(self) -> None:
        """Require that every depth had attention that could be changed."""
        for depth in self._depths:
            if not self._silenced[depth]:
                raise InterventionError(
                    f"no attention was seen on the way to depth {depth}; expected a softmax over keys that multiplies the "
                    "values, or one of torch's operations for it"
                )
