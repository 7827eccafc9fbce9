"""What are the values of a memory as (tokens, streams, features)? And the steps between them, run again on units."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from depthscope.probes.reading.branches import Branch
from depthscope.probes.reading.graph import (
    PARAMETER,
    Graph,
    ReadingError,
    TracedValue,
    names,
    values_in,
    walk,
)
from depthscope.probes.reading.memory import Memory
from depthscope.probes.reading.numbers import Numbers
from depthscope.probes.reading.operations import (
    CHANNEL_NORMS,
    FUNCTIONS,
    JOINS,
    MATRICES,
    NORMS,
    PARTS,
    PRODUCTS,
    REDUCES,
    SAME,
    SUMS,
    TURNS,
    VIEWS,
    ZEROS,
    addends,
    mixed_axes,
    part_of,
)

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
        return self.order([self.numbers(value) for value in cut])[1]

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
        order, n = self.order(numbers)
        parts = [tensor.reshape(len(tensor), -1).to(kind) for tensor in tensors]
        flat = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        shape = self._shape(num_features)
        flat = flat if order is None else flat[:, order.to(flat.device)]
        if flat.shape[1] != math.prod(shape) * n:
            raise ReadingError("a state does not hold every token and feature of the first one")
        return flat.reshape(-1, *shape, n).movedim(1 + self.axis, -1).reshape(len(flat), -1, n, num_features)

    def _shape(self, num_features: int) -> tuple[int, ...]:
        shape = self.memory.shape
        return (*shape[: self.axis], num_features, *shape[self.axis + 1 :])

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


Table = dict[int, dict[Hashable, torch.Tensor]]  # by value, and by what it holds
SIGNED = names("add sub rsub")
ALONG_AXES = TURNS | names("cumsum convolution")
# What does the same on one feature alone; what is not among it, as attention, is run on all features.
ON_ONE = REDUCES | names("permute transpose t mT repeat where lerp masked_fill")


class FeaturesDiffer(ReadingError):
    """A step that has to be run on all features."""


@dataclass(frozen=True)
class Box:
    """Elements of a value: their numbers, and their places along each axis on which they are not all."""

    numbers: Numbers
    places: Sequence[np.ndarray | None] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the elements."""
        return self.numbers.shape

    def zeros(self, kind: torch.dtype, device: torch.device) -> torch.Tensor:
        """Nothing, on these elements."""
        return torch.zeros(self.shape, dtype=kind, device=device)

    def cut(self, axis: int) -> np.ndarray | None:
        """The places along an axis, if some are left out."""
        return None if self.places is None else self.places[axis]


class Replays:
    """The steps of a memory run again: on all features, or on the first one alone where they treat all alike."""

    def __init__(self, states: States, *, one_feature: bool):
        self._states, self._graph, self._one = states, states.graph, one_feature
        self.num_features = 1 if one_feature else states.num_features
        root = states.memory.root
        self.kind = torch.float64 if root.dtype == torch.float64 else torch.float32
        self.device = self._graph.tensor(root).device

    def held(self, targets: Sequence[TracedValue], units: Table) -> Table:
        """What some values hold of others, through all steps between these."""
        table = {number: dict(of) for number, of in units.items()}
        for value in self.between(targets, units):
            found: dict[Hashable, torch.Tensor] = {}
            for operand in self.taken(value):
                for basis, tensor in table.get(operand.number, {}).items():
                    part = self._through(value, operand, tensor)
                    found[basis] = found[basis] + part if basis in found else part
            table[value.number] = found
        return table

    def constants(self, targets: Sequence[TracedValue], numbers: Collection[int]) -> dict[int, torch.Tensor]:
        """What else is added on the ways from values with some numbers."""
        found: dict[int, torch.Tensor] = {}
        for value in self.between(targets, numbers):
            taken = self.taken(value)
            parts = [self._through(value, p, found[p.number]) for p in taken if p.number in found]
            if self.adds_constant(value):
                zeros = {p.number: torch.zeros(p.shape, dtype=p.dtype, device=self.device) for p in taken}
                own = self._graph.run(value, partial(self._own, zeros))
                parts.append(own.to(self.kind))
            if parts:
                found[value.number] = sum(parts[1:], parts[0])
        return found

    def _own(self, given: Mapping[int, torch.Tensor], of: TracedValue) -> torch.Tensor:
        return given[of.number] if of.number in given else self._graph.tensor(of)

    def between(self, targets: Sequence[TracedValue], begins: Collection[int]) -> list[TracedValue]:
        """The steps that lead to some values from those with some numbers, in order."""
        first = min(begins)

        def steps(values: Iterable[TracedValue]) -> list[TracedValue]:
            return [value for value in values if value.number > first and value.number not in begins]

        found = walk(steps(targets), lambda value: steps(self.taken(value)))
        return sorted(found, key=lambda value: value.number)

    def taken(self, value: TracedValue) -> list[TracedValue]:
        """What a step takes of the memory, and of branches that are written into it."""
        memory, number = self._states.memory, value.number
        found = memory.inside(value) if number in memory.carried else []
        found += [v for v in memory.writes.get(number, ()) if v is not value]
        return found + self._states.steps.get(number, [])

    def adds_constant(self, value: TracedValue) -> bool:
        """Whether an operation adds something that is neither of the memory nor of a branch."""
        given = (value.args[at] for at in SUMS.get(value.name, ()) if at < len(value.args))
        known, holds = self._states.linked, self._states.memory.holds
        others = [v for v in addends(value) if not holds(v) and v.number not in known and v.name not in ZEROS]
        return bool(others) or any(isinstance(of, (int, float)) and of != 0 for of in given)

    def box(self, value: TracedValue) -> Box:
        """The elements of a value on which its step is run again."""
        numbers = self._states.numbers(value)
        if not self._one:
            return Box(numbers)
        found = numbers.first_feature(self._states.feature_stride, self._states.num_features)
        if found is None:
            raise FeaturesDiffer
        return Box(*found)

    def unit(self, cut: Sequence[TracedValue], stream: int, streams: int) -> dict[int, torch.Tensor]:
        """Values that are one in one of their streams, and zero in the others."""
        boxes = [self.box(value) for value in cut]
        if streams == 1 and len(cut) == 1:
            return {cut[0].number: torch.ones(boxes[0].shape, dtype=self.kind, device=self.device)}
        order, n = self._states.order([box.numbers for box in boxes])
        sizes = [math.prod(box.shape) for box in boxes]
        flat = torch.zeros(sum(sizes), dtype=self.kind)
        flat[(torch.arange(len(flat)) if order is None else order).reshape(-1, n)[:, stream]] = 1
        parts = zip(cut, boxes, flat.to(self.device).split(sizes), strict=True)
        return {v.number: part.reshape(box.shape) for v, box, part in parts}

    def _through(self, value: TracedValue, operand: TracedValue, tensor: torch.Tensor) -> torch.Tensor:
        """What a step makes of one of its operands, where all others that it adds are zero."""
        shape, name = self.box(value).shape, value.name
        if name in SIGNED:
            scale = _scale(value, operand)
            found = tensor if scale == 1 else tensor * scale
        elif name in VIEWS or name in SAME or name in ("squeeze", "unsqueeze"):
            found = (-tensor if name == "neg" else tensor).reshape(shape)
        elif name in PRODUCTS:
            found = self._product(value, operand, tensor)
        elif name == "copy":
            found = tensor if operand is value.args[1] else tensor.new_zeros(())
        elif name in JOINS:
            found = self._joined(value, operand, tensor, shape)
        elif name in PARTS:
            found = self._part(value, operand, tensor)
        else:
            found = tensor if name == "expand" else self._run(value, operand, tensor)
        return found if found.shape == shape else found.expand(shape)

    def _product(self, value: TracedValue, operand: TracedValue, tensor: torch.Tensor) -> torch.Tensor:
        for other in value.args:
            if other is not operand:
                by = self._factor(value, other) if isinstance(other, TracedValue) else other
                tensor = tensor / by if value.name == "div" else tensor * by
        return tensor

    def _joined(
        self, value: TracedValue, operand: TracedValue, tensor: torch.Tensor, shape: tuple[int, ...]
    ) -> torch.Tensor:
        axis = (value.args[1] if len(value.args) > 1 else value.kwargs.get("dim", 0)) % len(shape)
        found, start = tensor.new_zeros(shape), 0
        for piece in values_in(value.args[0]):
            size = 1 if value.name == "stack" else self._size(value, piece, axis)
            if piece is operand:
                part = tensor.unsqueeze(axis) if value.name == "stack" else tensor
                found.narrow(axis, start, size).copy_(part)
            start += size
        return found

    def _size(self, value: TracedValue, piece: TracedValue, axis: int) -> int:
        if self._states.memory.holds(piece) or piece.number in self._states.linked:
            return self.box(piece).shape[axis]
        if self.box(value).cut(axis) is not None:
            raise FeaturesDiffer
        return piece.shape[axis]

    def _part(self, value: TracedValue, operand: TracedValue, tensor: torch.Tensor) -> torch.Tensor:
        axis, part = part_of(value)
        if self.box(operand).cut(axis) is not None:
            raise FeaturesDiffer
        return tensor[(slice(None),) * axis + (part,)]

    def _factor(self, value: TracedValue, of: TracedValue) -> torch.Tensor:
        """What is multiplied with a value, where it is the same for all features."""
        tensor = self._graph.tensor(of)
        if self._one:
            box = self.box(value)
            for axis in range(-1, -1 - tensor.ndim, -1):
                if tensor.shape[axis] > 1 and box.cut(axis) is not None:
                    if tensor.stride(axis):
                        raise FeaturesDiffer
                    tensor = tensor.narrow(axis, 0, box.shape[axis])
        return tensor.to(self.kind) if tensor.is_floating_point() else tensor

    def _run(self, value: TracedValue, operand: TracedValue, tensor: torch.Tensor) -> torch.Tensor:
        if self._one and not self._runs_on_one(value, operand):
            raise FeaturesDiffer
        added = {v.number for v in addends(value)}

        def given(of: TracedValue) -> torch.Tensor:
            if of is operand:
                return tensor
            if of.number in added:
                is_known = self._states.memory.holds(of) or of.number in self._states.linked
                return tensor.new_zeros(self.box(of).shape if is_known else of.shape)
            if value.name in SUMS:
                return self._factor(value, of)
            own = self._graph.tensor(of)
            return own.to(self.kind) if own.is_floating_point() else own

        sums = SUMS.get(value.name, ())
        args = [
            0 if at in sums and isinstance(arg, (int, float)) else arg for at, arg in enumerate(value.args)
        ]
        return self._graph.run(value, given, args)

    def _runs_on_one(self, value: TracedValue, operand: TracedValue) -> bool:
        """Whether an operation of this name does the same on one feature alone."""
        box, known = self.box(value), self._states
        if any(not known.memory.holds(v) and v.number not in known.linked for v in addends(value)):
            return False
        if value.name in MATRICES:
            return all(box.cut(axis) is None for axis in range(len(value.shape) - 2))
        if value.name in ALONG_AXES:
            axes = mixed_axes(value) or ()
            return all(of.cut(axis) is None for of in (box, self.box(operand)) for axis in axes)
        return value.name in ON_ONE


def _scale(value: TracedValue, operand: TracedValue) -> float:
    """With which factor a sum holds an operand."""
    alpha = value.kwargs.get("alpha", 1)
    scales = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[value.name]
    return sum(scale for scale, argument in zip(scales, value.args, strict=False) if argument is operand)
