"""What does a value hold of earlier ones? The carried steps between them, run again on units."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from depthscope.probes.reading.graph import ReadingError, TracedValue, names, values_in, walk
from depthscope.probes.reading.numbers import Numbers
from depthscope.probes.reading.operations import (
    ATTENTIONS,
    JOINS,
    MATRICES,
    MIXED_ALONG,
    PARTS,
    PRODUCTS,
    REDUCES,
    SAME,
    SOLVES,
    SUMS,
    VIEWS,
    ZEROS,
    addends,
    mixed_axes,
    part_of,
)  # fmt: skip
from depthscope.probes.reading.states import States

Table = dict[int, dict[Hashable, torch.Tensor]]  # by value, and by what it holds
SIGNED = names("add sub rsub")
# What does the same on one feature alone; along an axis that is no part of the features.
ON_ONE = REDUCES | names("permute transpose t mT repeat where lerp masked_fill")
ALONG_AN_AXIS = names("index_select index_add index_copy slice_scatter select_scatter select")


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
        # By number: what comes into the steps from elsewhere, in the place of what the forward had.
        self.given: Mapping[int, torch.Tensor] = {}
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
        if any(isinstance(number, (int, float)) and number != 0 for number in given):
            return True
        known = self._states.linked
        others = (v for v in addends(value) if not self._states.memory.holds(v) and v.number not in known)
        return any(v.name not in ZEROS for v in others)

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
        places = self.box(operand).cut(axis)
        if places is not None:
            if isinstance(part, int):
                raise FeaturesDiffer
            chosen = np.isin(places, np.arange(operand.shape[axis])[part])
            return tensor.index_select(axis, torch.from_numpy(np.flatnonzero(chosen)).to(tensor.device))
        return tensor[(slice(None),) * axis + (part,)]

    def _tensor(self, value: TracedValue) -> torch.Tensor:
        given = self.given.get(value.number)
        return self._graph.tensor(value) if given is None else given

    def _factor(self, value: TracedValue, of: TracedValue) -> torch.Tensor:
        """What is multiplied with a value, where it is the same for all features."""
        tensor = self._tensor(of)
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
            own = self._tensor(of)
            return own.to(self.kind) if own.is_floating_point() else own

        sums = SUMS.get(value.name, ())
        args = [
            0 if at in sums and isinstance(arg, (int, float)) else arg for at, arg in enumerate(value.args)
        ]
        return self._graph.run(value, given, args)

    def _runs_on_one(self, value: TracedValue, operand: TracedValue) -> bool:
        """Whether an operation of this name does the same on one feature alone."""
        box = self.box(value)
        known = self._states
        if any(not known.memory.holds(v) and v.number not in known.linked for v in addends(value)):
            return False
        if value.name in ATTENTIONS:  # their kernels take as many features of the values as of the keys
            return False
        if value.name in MATRICES:
            return all(box.cut(axis) is None for axis in range(len(value.shape) - 2))
        # A matrix of a solve has all axes but these two
        if value.name in MIXED_ALONG and value.name not in ON_ONE:
            axes = {*(mixed_axes(value) or ()), *range(len(value.shape) - 2 if value.name in SOLVES else 0)}
            return all(of.cut(axis) is None for of in (box, self.box(operand)) for axis in axes)
        if value.name in ALONG_AN_AXIS:
            return self.box(operand).cut(value.args[1]) is None
        return value.name in ON_ONE


def _scale(value: TracedValue, operand: TracedValue) -> float:
    """With which factor a sum holds an operand."""
    alpha = value.kwargs.get("alpha", 1)
    scales = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[value.name]
    return sum(scale for scale, argument in zip(scales, value.args, strict=False) if argument is operand)
