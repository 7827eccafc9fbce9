"""Which tensors of some shapes does a recorded forward handle? The values of its graph, with tensors that autograd knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from depthscope.probes.model.tensors import version
from depthscope.probes.reading.graph import Graph, TracedValue


@dataclass(frozen=True)
class ComputedValue:
    """A value of the graph with its tensor.

    ``value``: the value.
    ``tensor``: its content may have been rewritten since, see ``rewritten``.
    ``written``: torch's count of writes at that time.
    """

    value: TracedValue
    tensor: torch.Tensor
    written: int | None

    @property
    def number(self) -> int:
        """Of the value in the graph; later values have larger numbers."""
        return self.value.number

    @property
    def rewritten(self) -> bool:
        """Whether it was written in place since, or its memory was freed, as that of weights that are gathered for a call."""
        freed = (
            self.tensor.numel() > 0 and not self.tensor.is_meta and not self.tensor.untyped_storage().size()
        )
        return freed or self.written != version(self.tensor)


class ComputedValues:
    """The floating tensors of some shapes among the values of a forward that is recorded, by their numbers.

    ``graph``: of the forward.
    ``accepts``: ``accepts(shape) -> bool``.
    """

    def __init__(self, graph: Graph, accepts: Callable[[tuple[int, ...]], bool]):
        self.graph = graph
        self.by_number: dict[int, ComputedValue] = {}
        self._accepts = accepts
        self._accepted: dict[tuple[int, ...], bool] = {}  # this is asked at every operand of every operation

    def take(self, value: TracedValue, tensor: torch.Tensor) -> None:
        """Note a value that an operation takes: its tensor has its graph by now."""
        accepted = self._accepted.get(value.shape)
        if accepted is None:
            accepted = self._accepted[value.shape] = self._accepts(value.shape)
        if accepted and value.is_floating:
            self.by_number[value.number] = ComputedValue(value, tensor, version(tensor))

    def in_order(self) -> list[ComputedValue]:
        """All that are what they were."""
        return [self.by_number[n] for n in sorted(self.by_number) if not self.by_number[n].rewritten]
