"""Which matrices over streams does a recorded forward handle? The values of its graph, with tensors that autograd knows."""

from __future__ import annotations

import torch

from depthscope.probes.model.tensors import version
from depthscope.probes.reading.graph import Graph, TracedValue


class ComputedValues:
    """The matrices (…, n, n) among the values of a forward that is recorded, by their numbers.

    ``graph``: of the forward.
    ``num_streams``: n.
    """

    def __init__(self, graph: Graph, num_streams: int):
        self.graph = graph
        self._shape = (num_streams, num_streams)
        # With torch's count of writes into the tensor at that time.
        self._taken: dict[int, tuple[torch.Tensor, int | None]] = {}

    def take(self, value: TracedValue, tensor: torch.Tensor) -> None:
        """Note a value that an operation takes: its tensor has its graph by now."""
        if value.shape[-2:] == self._shape and value.is_floating:
            self._taken[value.number] = tensor, version(tensor)

    def tensor(self, value: TracedValue) -> torch.Tensor:
        """The tensor of a value that was taken."""
        return self._taken[value.number][0]

    def has(self, value: TracedValue) -> bool:
        """Whether a value was taken and is what it was: not written in place, nor freed, as weights are that are gathered."""
        if value.number not in self._taken:
            return False
        tensor, written = self._taken[value.number]
        freed = tensor.numel() > 0 and not tensor.is_meta and not tensor.untyped_storage().size()
        return not freed and written == version(tensor)

    def in_order(self) -> list[TracedValue]:
        """All that are what they were."""
        return [value for n in sorted(self._taken) if self.has(value := self.graph.values[n])]
