"""What are the states as arrays, and what do carried steps make of others? (tokens, streams, features), and replays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from depthscope.probes.reading.branches import Branch
from depthscope.probes.reading.graph import ReadingError, TracedValue
from depthscope.probes.reading.memory import Memory
from depthscope.probes.reading.numbers import Numbers
from depthscope.probes.reading.operations import CHANNEL_NORMS, NORMS
from depthscope.probes.reading.replays import run

Given = Mapping[int, torch.Tensor]


class States:
    """The arrays of a memory's values, and the steps between them run again on other values."""

    def __init__(self, memory: Memory, branches: Sequence[Branch]):
        self.memory, self.graph = memory, memory.graph
        self.axis = feature_axis(memory)
        self.num_features = memory.shape[self.axis]
        self.token_shape = tuple(size for dim, size in enumerate(memory.shape) if dim != self.axis)
        self._orders: dict[tuple, tuple[torch.Tensor | None, int]] = {}
        self._steps: dict[int, list[TracedValue]] = {}
        for branch in branches:
            for number, before in branch.steps.items():
                self._steps.setdefault(number, []).append(before)

    def order(self, parts: Sequence[Numbers]) -> tuple[torch.Tensor | None, int]:
        """How elements are sorted by token, feature and stream, None where they are; and the number of streams."""
        key = tuple(part.key for part in parts)
        if key not in self._orders:
            flat = np.concatenate([part.dense().reshape(-1) for part in parts])
            order = np.argsort(flat, kind="stable")
            order = order[int((flat < 0).sum()) :]  # what holds nothing yet, as the rest of a buffer
            _, counts = np.unique(flat[order], return_counts=True)
            if len(set(counts.tolist())) != 1:
                raise ReadingError("some tokens or features have more streams than others")
            sorted_already = np.array_equal(order, np.arange(len(flat)))
            self._orders[key] = None if sorted_already else torch.from_numpy(order), int(counts[0])
        return self._orders[key]

    def num_streams(self, cut: Sequence[TracedValue]) -> int:
        """How many values of each token and feature some values hold."""
        return self.order([self.memory.carried[value.number] for value in cut])[1]

    def array(self, cut: Sequence[TracedValue], given: Given | None = None) -> torch.Tensor:
        """Some values of the memory, or others in their places, as (tokens, streams, features)."""
        tensors = [self.graph.tensor(v) if given is None else given[v.number] for v in cut]
        return self.sorted(tensors, [self.memory.carried[value.number] for value in cut])

    def sorted(self, tensors: Sequence[torch.Tensor], numbers: Sequence[Numbers]) -> torch.Tensor:
        """Tensors whose elements have numbers of the memory, as (tokens, streams, features)."""
        order, n = self.order(numbers)
        kind = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        flat = torch.cat([t.reshape(-1).to(kind) for t in tensors])
        flat = flat if order is None else flat[order.to(flat.device)]
        if flat.numel() != self.memory.count * n:
            raise ReadingError("a state does not hold every token and feature of the first one")
        shape = self.memory.shape
        return flat.reshape(*shape, n).movedim(self.axis, -1).reshape(-1, n, shape[self.axis])

    def unit(self, cut: Sequence[TracedValue], stream: int) -> dict[int, torch.Tensor]:
        """Values that are one in one stream, and zero in the others."""
        order, n = self.order([self.memory.carried[value.number] for value in cut])
        sizes = [value.numel for value in cut]
        flat = torch.zeros(sum(sizes))
        if order is None:
            flat.reshape(-1, n)[:, stream] = 1
        else:
            flat[order.reshape(-1, n)[:, stream]] = 1
        parts = zip(cut, flat.split(sizes), strict=True)
        return {v.number: part.reshape(v.shape).to(self.graph.tensor(v)) for v, part in parts}

    def replay(
        self, targets: Sequence[TracedValue], given: Given, *, real: bool = False
    ) -> dict[int, torch.Tensor]:
        """Values of the memory once more, from others; what branches add counts as zero unless ``real``."""
        done: dict[int, torch.Tensor | None] = dict(given)
        for value in self._needed(targets, given):
            operands = {
                p.number: found for p in self._taken(value) if (found := done.get(p.number)) is not None
            }
            if not operands:
                done[value.number] = None
                continue
            if not real:
                for p in self._taken(value):
                    if self.memory.holds(p) and p.number not in operands:
                        operands[p.number] = torch.zeros_like(self.graph.tensor(p))
            done[value.number] = run(self.graph, value, operands, real=real)
        found = {}
        for value in targets:
            again = done.get(value.number)
            found[value.number] = torch.zeros_like(self.graph.tensor(value)) if again is None else again
        return found

    def _needed(self, targets: Sequence[TracedValue], given: Given) -> list[TracedValue]:
        first = min(given)
        needed: dict[int, TracedValue] = {}
        waiting = list(targets)
        while waiting:
            value = waiting.pop()
            if value.number in given or value.number in needed or value.number < first:
                continue
            needed[value.number] = value
            waiting += self._taken(value)
        return [needed[number] for number in sorted(needed)]

    def _taken(self, value: TracedValue) -> list[TracedValue]:
        """What a step takes of the memory, and of branches that are written into it."""
        memory = self.memory
        found = memory.inside(value) if memory.holds(value) else []
        found = [*found, *(v for v in memory.writes.get(value.number, ()) if v is not value)]
        return [*found, *self._steps.get(value.number, ())]

    def before_functions(self, value: TracedValue) -> TracedValue:
        """Back over the norms and activations at the end of a step."""
        memory, seen, at = self.memory, False, value
        while at is not memory.root and at.number not in memory.writes and not memory.mixes(at):
            seen = seen or memory.passes_function(at)
            at = memory.inside(at)[0]
        return at if seen else value


def feature_axis(memory: Memory) -> int:
    """Which axis of the memory's first value are the features: that along which weights contract it or norms go."""
    strides = [math.prod(memory.shape[dim + 1 :]) for dim in range(len(memory.shape))]
    votes = [0] * len(strides)
    for value, taker in memory.leaves:
        axis = _voted_axis(value, taker)
        if axis is None or value.shape[axis] < 2:
            continue
        step = _step(memory.carried[value.number], axis)
        for dim, stride in enumerate(strides):
            if memory.shape[dim] > 1 and stride == step:
                votes[dim] += 1
    return max(range(len(votes)), key=lambda dim: (votes[dim], dim))


def _voted_axis(value: TracedValue, taker: TracedValue) -> int | None:
    """The axis along which an opaque operation takes features together."""
    at = next((n for n, argument in enumerate(taker.args) if argument is value), None)
    if (taker.name in ("mm", "bmm", "matmul") and at == 0) or (taker.name == "addmm" and at == 1):
        return len(value.shape) - 1
    if taker.name in CHANNEL_NORMS or taker.name == "convolution":
        return 1 if len(value.shape) > 1 else None
    return len(value.shape) - 1 if taker.name in NORMS else None


def _step(numbers: Numbers, axis: int) -> int:
    """How far the numbers of neighbours along an axis are apart."""
    vector = (
        numbers.axes[axis]
        if numbers.array is None
        else np.moveaxis(numbers.array, axis, -1).reshape(-1, numbers.shape[axis])[0]
    )
    return abs(int(vector[-1] - vector[-2]))
