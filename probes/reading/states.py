"""What are a memory's values as arrays? (tokens, streams, features), in the order of the first value's elements."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

import numpy as np
import torch

from depthscope.probes.reading.branches import Branch
from depthscope.probes.reading.graph import PARAMETER, Graph, ReadingError, TracedValue
from depthscope.probes.reading.memory import Memory
from depthscope.probes.reading.numbers import Numbers
from depthscope.probes.reading.operations import CHANNEL_NORMS, FUNCTIONS, NORMS, PRODUCTS

RECURRENT = re.compile("rnn|lstm|gru")
MOST_ARRAYS = 4  # that were asked for last
UNEQUAL = "some tokens or features have more streams than others"


class States:
    """The arrays of a memory's values, and of what branches add to it."""

    def __init__(self, memory: Memory, branches: Sequence[Branch]):
        self.memory, self.graph = memory, memory.graph
        self.axis = feature_axis(memory)
        self.num_features = memory.shape[self.axis]
        self.feature_stride = math.prod(memory.shape[self.axis + 1 :])
        self.token_shape = tuple(size for dim, size in enumerate(memory.shape) if dim != self.axis)
        self._orders: dict[tuple, tuple[torch.Tensor | None, int]] = {}
        self._arrays: dict[tuple[int, ...], torch.Tensor] = {}
        self._numbers: dict[int, Numbers] = {}
        # On the ways from branches to their writes: what each step moves or scales.
        self.steps: dict[int, list[TracedValue]] = {}
        self.linked = {branch.source.number for branch in branches}
        for branch in branches:
            if not branch.numbers:
                path = self.graph.path(branch.source) or "the model"
                raise ReadingError(f"one output of {path} is added to several tokens or features")
            self._numbers |= branch.numbers
            for number, before in branch.steps.items():
                self.steps.setdefault(number, []).append(before)
                self.linked.add(number)

    def forget(self) -> None:
        """Hold no array of an earlier forward."""
        self._arrays.clear()

    def numbers(self, value: TracedValue) -> Numbers:
        """The memory's elements that a value holds, or that it is added to on the way from a branch."""
        carried = self.memory.carried.get(value.number)
        return self._numbers[value.number] if carried is None else carried

    def has_numbers(self, value: TracedValue) -> bool:
        """Whether it is known which of the memory's elements a value holds."""
        return value.number in self.memory.carried or value.number in self._numbers

    def order(self, parts: Sequence[Numbers]) -> tuple[torch.Tensor | None, int]:
        """How elements are sorted by token, feature and stream, None where they are; and the number of streams."""
        key = tuple(part.key for part in parts)
        if key not in self._orders:
            flat = np.concatenate([part.dense().reshape(-1) for part in parts])
            order = np.argsort(flat, kind="stable")
            order = order[int((flat < 0).sum()) :]  # what holds nothing yet, as the rest of a buffer
            counts = np.bincount(flat[order])
            streams = int(counts.max(initial=0))
            if ((counts != streams) & (counts != 0)).any():
                raise ReadingError(UNEQUAL)
            is_sorted = len(order) == len(flat) and bool((order[1:] > order[:-1]).all())
            self._orders[key] = None if is_sorted else torch.from_numpy(order), streams
        return self._orders[key]

    def num_streams(self, cut: Sequence[TracedValue]) -> int:
        """How many values of each token and feature some values hold."""
        numbers = [self.numbers(value) for value in cut]
        found = [part.arrangement(self.memory.shape, self.axis, self.num_features) for part in numbers]
        if any(of is None for of in found):
            return self.order(numbers)[1]
        return sum(of.streams for of in found if of is not None)

    def array(self, cut: Sequence[TracedValue]) -> torch.Tensor:
        """Some values of the memory as (tokens, streams, features)."""
        key = tuple(value.number for value in cut)
        if key not in self._arrays:
            tensors = [self.graph.tensor(value)[None] for value in cut]
            self._arrays[key] = self.sorted(tensors, [self.numbers(v) for v in cut], self.num_features)[0]
            if len(self._arrays) > MOST_ARRAYS:
                del self._arrays[next(iter(self._arrays))]
        return self._arrays[key]

    def sorted(
        self, tensors: Sequence[torch.Tensor], numbers: Sequence[Numbers], num_features: int
    ) -> torch.Tensor:
        """Some arrays of elements that have numbers of the memory, as (arrays, tokens, streams, features)."""
        kind = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        parts = [self._arranged(t.to(kind), of, num_features) for t, of in zip(tensors, numbers, strict=True)]
        known = [part for part in parts if part is not None]
        if len(known) == len(parts):
            return known[0] if len(known) == 1 else torch.cat(known, 2)
        order, n = self.order(numbers)
        flat = torch.cat([tensor.reshape(len(tensor), -1).to(kind) for tensor in tensors], 1)
        shape = self._shape(num_features)
        flat = flat if order is None else flat[:, order.to(flat.device)]
        if flat.shape[1] != math.prod(shape) * n:
            raise ReadingError("a state does not hold every token and feature of the first one")
        return flat.reshape(-1, *shape, n).movedim(1 + self.axis, -1).reshape(len(flat), -1, n, num_features)

    def _shape(self, num_features: int) -> tuple[int, ...]:
        shape = self.memory.shape
        return (*shape[: self.axis], num_features, *shape[self.axis + 1 :])

    def _arranged(self, tensor: torch.Tensor, numbers: Numbers, num_features: int) -> torch.Tensor | None:
        found = numbers.arrangement(self.memory.shape, self.axis, num_features)
        if found is None:
            return None
        if not found.is_sorted:
            tensor = tensor.reshape(len(tensor), *found.sizes).permute(0, *(1 + dim for dim in found.order))
        return tensor.reshape(len(tensor), -1, found.streams, num_features)

    def output(self, branch: Branch) -> torch.Tensor:
        """What a branch gave as (tokens, streams, features); zero at the tokens and features that it does not write to."""
        own, numbers = self.graph.tensor(branch.source), self.numbers(branch.source)
        if numbers.distinct == self.memory.count:
            return self.sorted([own[None]], [numbers], self.num_features)[0]
        if numbers.distinct != numbers.count:
            raise ReadingError(UNEQUAL)
        places = torch.from_numpy(np.array(numbers.dense().reshape(-1)))
        flat = own.reshape(-1)[places >= 0]
        found = flat.new_zeros(math.prod(self.memory.shape)).index_put((places[places >= 0],), flat)
        return self.sorted([found[None]], [Numbers.first(self.memory.shape)], self.num_features)[0]

    def before_functions(self, value: TracedValue, begins: Collection[int]) -> TracedValue:
        """Back over the norms and activations at the end of a step, up to where it begins."""
        seen = False
        for at in self.memory.line(value):
            if at.number in begins or at.number in self.memory.writes or self.memory.mixes(at):
                return at if seen else value
            seen = seen or self.memory.passes_function(at)
        return value

    def after_functions(self, value: TracedValue) -> TracedValue:
        """Forward over the norms and activations with which a step begins, and the gain of a norm in single operations."""
        memory, found = self.memory, value
        for at in memory.after(value):
            if at.number in memory.writes or memory.mixes(at) or at.numel != value.numel:
                break
            is_gain = at.name in PRODUCTS and any(of.kind == PARAMETER and of.numel > 1 for of in at.parents)
            follows = found is not value and is_gain and found in memory.inside(at)
            found = at if memory.passes_function(at) or follows else found
        return found


def has_feature_axis(memory: Memory) -> bool:
    """Whether the features of a memory lie along an axis of its first value."""
    votes, others = _votes(memory)
    return any(votes) or not others


def feature_axis(memory: Memory) -> int:
    """Which axis of the memory's first value are the features: that along which weights contract it or norms go.

    Raises ReadingError: Where these go along something else than an axis.
    """
    votes, others = _votes(memory)
    if others and not any(votes):
        path = memory.graph.path(memory.root) or "the model"
        raise ReadingError(f"the first state, of {path}, has its features in no axis of their own")
    usual = 1 if memory.root.name == "convolution" and not any(votes) else len(votes) - 1
    return max(range(len(votes)), key=lambda dim: (votes[dim], dim == usual, dim))


def _votes(memory: Memory) -> tuple[list[int], int]:
    """How often each axis of a memory's first value is taken for the features, and how often something else is."""
    strides = [math.prod(memory.shape[dim + 1 :]) for dim in range(len(memory.shape))]
    votes, others = [0] * len(strides), 0
    for value, taker in memory.leaves:
        axis = _axis_after_activations(memory.graph, value, taker)
        if axis is None or value.shape[axis] < 2:
            continue
        numbers = memory.carried[value.number]
        step, most = numbers.step(axis), numbers.distinct_along(axis)
        fitting = [dim for dim, stride in enumerate(strides) if memory.shape[dim] > 1 and stride == step]
        others += not fitting
        for dim in fitting:
            votes[dim] += 2 if most <= memory.shape[dim] else 1  # what has more is several axes in one
    return votes, others


def _axis_after_activations(graph: Graph, value: TracedValue, taker: TracedValue) -> int | None:
    """The same, where activations, scales and padding come first."""
    waiting = [(value, taker)]
    for _ in range(8):
        if not waiting:
            break
        of, by = waiting.pop(0)
        axis = _voted_axis(of, by)
        if axis is not None:
            return axis
        passes = by.name in FUNCTIONS or by.name in PRODUCTS or "pad" in by.name
        if len(by.shape) == len(value.shape) and passes:
            waiting += [(by, next_taker) for next_taker in graph.takers(by)]
    return None


def _voted_axis(value: TracedValue, taker: TracedValue) -> int | None:
    """The axis along which an opaque operation takes features together."""
    at = next((n for n, argument in enumerate(taker.args) if argument is value), None)
    if (taker.name in ("mm", "bmm", "matmul", "linear") and at == 0) or (taker.name == "addmm" and at == 1):
        return len(value.shape) - 1
    if taker.name in CHANNEL_NORMS or taker.name == "convolution":
        return 1 if len(value.shape) > 1 else None
    for gain in taker.parents if taker.shape == value.shape else ():
        if gain.kind == PARAMETER and gain.numel == max(gain.shape, default=0) > 1:  # one number a feature
            return len(value.shape) - len(gain.shape) + gain.shape.index(gain.numel)
    return len(value.shape) - 1 if taker.name in NORMS or RECURRENT.search(taker.name) else None
