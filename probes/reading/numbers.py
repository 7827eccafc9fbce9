"""Which elements of a memory's first value lie where? A number for each element of a value, mostly a sum over its axes.

The elements of the first value are numbered in order. What views, expands or joins it has the same numbers elsewhere; they
are almost always a sum of one vector an axis, and then nothing of the value's size is computed. Where they are not, all of
them are held. An element that is no part of the memory, such as padding, has the number `NOTHING`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property, reduce, wraps
from itertools import accumulate
from operator import mul
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

NOTHING = -1
_HOLE = -(1 << 56)  # in a vector of an axis: whatever is added to it stays negative

Vectors = tuple[np.ndarray, ...]


def _computed_once(make: Callable[..., Any]) -> Callable[..., Any]:
    """What is made of one object is made once: what equal blocks do to it is one object too, and is looked up from then on."""

    @wraps(make)
    def found(self: Numbers, *args: Any) -> Any:
        known = (make.__name__, *(tuple(arg) if isinstance(arg, list) else arg for arg in args))
        if known not in self._made:
            self._made[known] = make(self, *args)
        return self._made[known]

    return found


class Numbers:
    """The numbers of the elements of one value: ``offset`` plus a vector an axis, or an ``array`` of all."""

    def __init__(self, axes: Vectors = (), offset: int = 0, array: np.ndarray | None = None):
        self.axes, self.offset, self.array = axes, offset, array
        self._made: dict[tuple[Any, ...], Any] = {}

    @classmethod
    def first(cls, shape: Sequence[int]) -> Numbers:
        """The numbers of a memory's first value."""
        strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        return cls(tuple(np.arange(size) * stride for size, stride in zip(shape, strides, strict=True)))

    @classmethod
    def of(cls, array: np.ndarray) -> Numbers | None:
        """The numbers of an array, as a sum over its axes where they are one; None where nothing is of the memory."""
        if not array.size or (array < 0).all():
            return None
        base = np.unravel_index(int((array >= 0).argmax()), array.shape)
        offset = int(array[base])
        axes = []
        for dim in range(array.ndim):
            place: list[Any] = list(base)
            place[dim] = slice(None)
            vector = array[tuple(place)].astype(np.int64)
            axes.append(np.where(vector < 0, _HOLE, vector - offset))
        found = cls(tuple(axes), offset)
        same = np.array_equal(found.dense(), np.maximum(array, NOTHING))
        return found if same else cls(array=np.maximum(array, NOTHING))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return self.array.shape if self.array is not None else tuple(len(axis) for axis in self.axes)

    def shared(self) -> Numbers:
        """The same numbers, as one object for all values that have them: what is made of it is then made once."""
        return self if self.array is not None else _shared.setdefault(self.key, self)

    def dense(self) -> np.ndarray:
        """The numbers of all elements."""
        if self.array is not None:
            return self.array
        total = np.array(self.offset, dtype=np.int64)
        for dim, axis in enumerate(self.axes):
            total = total + axis.reshape((-1,) + (1,) * (len(self.axes) - 1 - dim))
        return np.maximum(np.broadcast_to(total, self.shape), NOTHING)

    @cached_property
    def count(self) -> int:
        """How many elements are of the memory."""
        if self.array is not None:
            return int((self.array >= 0).sum())
        if self.offset <= _HOLE // 2:  # one place was taken, which holds nothing
            return 0
        return math.prod(int((axis > _HOLE // 2).sum()) for axis in self.axes)

    @cached_property
    def distinct(self) -> int:
        """How many elements of the first value they are."""
        if self.array is not None:
            return len(np.unique(self.array[self.array >= 0]))
        if not self.count:
            return 0
        return math.prod(len(np.unique(axis[axis > _HOLE // 2])) for axis in self.axes)

    @_computed_once
    def before_move(self, places: Numbers, shape: tuple[int, ...]) -> Numbers | None:
        """The numbers of what lies at ``places`` in a value with these; None where one element has several of them."""
        mine, target = places.dense(), self.dense()
        is_taken = mine >= 0
        found = np.full(math.prod(shape), NOTHING, dtype=np.int64)
        found[mine[is_taken]] = target[is_taken]
        # Over several tokens or features
        is_spread = (found[mine[is_taken]] != target[is_taken]).any()
        return None if is_spread else Numbers.of(found.reshape(shape))

    @cached_property
    def key(self) -> tuple[object, ...]:
        """What equal numbers have equal."""
        if self.array is not None:
            return self.shape, self.array.tobytes()
        shifts = [int(axis.max(initial=0)) if len(axis) else 0 for axis in self.axes]
        parts = [(axis - shift).clip(_HOLE).tobytes() for axis, shift in zip(self.axes, shifts, strict=True)]
        return self.shape, self.offset + sum(shifts), *parts

    @_computed_once
    def first_feature(self, stride: int, size: int) -> tuple[Numbers, list[np.ndarray | None]] | None:
        """The elements of one feature alone, and their places along each axis on which they are not all; None if no box."""
        if self.array is not None or any(not len(axis) or axis.min() <= _HOLE // 2 for axis in self.axes):
            return None
        places = [np.flatnonzero((axis - axis.min()) // stride % size == 0) for axis in self.axes]
        if math.prod(len(place) for place in places) * size != math.prod(self.shape):
            return None
        found = Numbers(
            tuple(axis[place] for axis, place in zip(self.axes, places, strict=True)), self.offset
        )
        if (found.dense() // stride % size).any():
            return None
        cut = zip(places, self.shape, strict=True)
        return found, [place if len(place) < length else None for place, length in cut]

    def step(self, axis: int) -> int:
        """How far the numbers of neighbours along an axis are apart; 1 where one has none."""
        vector = self._along(axis)
        return abs(int(vector[-1] - vector[-2])) if len(vector) > 1 else 1

    def distinct_along(self, axis: int) -> int:
        """How many different elements lie along an axis."""
        return len(np.unique(self._along(axis)))

    def _along(self, axis: int) -> np.ndarray:
        if self.array is None:
            return self.axes[axis]
        return np.moveaxis(self.array, axis, -1).reshape(-1, self.shape[axis])[0]

    @_computed_once
    def expand(self, shape: Sequence[int]) -> Numbers:
        """The same along new axes and axes of size one."""
        if tuple(shape) == self.shape:
            return self
        if self.array is not None:
            return Numbers(array=np.broadcast_to(self.array, tuple(shape)))
        new = len(shape) - len(self.axes)
        axes = [np.zeros(size, dtype=np.int64) for size in shape[:new]]
        for axis, size in zip(self.axes, shape[new:], strict=True):
            axes.append(axis if len(axis) == size else np.repeat(axis, size))
        return Numbers(tuple(axes), self.offset)

    @_computed_once
    def permute(self, dims: Sequence[int]) -> Numbers:
        """With the axes in another order."""
        if self.array is not None:
            return Numbers(array=self.array.transpose(tuple(dims)))
        return Numbers(tuple(self.axes[dim] for dim in dims), self.offset)

    @_computed_once
    def reshape(self, shape: Sequence[int]) -> Numbers | None:
        """The same elements in another shape."""
        if tuple(shape) == self.shape:
            return self
        if self.array is not None:
            again = self.array.reshape(tuple(shape))
            return Numbers.of(again) or Numbers(array=again)  # zeros hold nothing, and stay next to what does
        axes: list[np.ndarray] = []
        for group, sizes in _common_axes(self.shape, shape):
            vectors = [self.axes[dim] for dim in group] or [np.zeros(1, dtype=np.int64)]
            merged = reduce(lambda a, b: (a[:, None] + b).reshape(-1).clip(_HOLE), vectors)
            parts = _split_axis(merged, sizes)
            if parts is None:
                return Numbers.of(self.dense().reshape(tuple(shape)))
            axes += parts
        return Numbers(tuple(axes), self.offset)

    def take(self, axis: int, part: slice | int) -> Numbers:
        """A part along an axis, or one place of it."""
        return self._part(axis, part if isinstance(part, int) else (part.start, part.stop, part.step))

    @_computed_once
    def _part(self, axis: int, part: tuple[Any, ...] | int) -> Numbers:
        index = part if isinstance(part, int) else slice(*part)
        if self.array is not None:
            place = (slice(None),) * axis + (index,)
            return Numbers(array=self.array[place])
        before, own, after = self.axes[:axis], self.axes[axis], self.axes[axis + 1 :]
        if isinstance(index, int):
            return Numbers(before + after, self.offset + int(own[index]))
        return Numbers((*before, own[index], *after), self.offset)

    @_computed_once
    def collapsed(self, dims: Sequence[int]) -> Numbers | None:
        """One place along some axes; None where the numbers change along them."""
        if self.array is not None:
            return self._collapsed_array(tuple(dims))
        axes, offset = list(self.axes), self.offset
        for dim in dims:
            real = axes[dim][axes[dim] > _HOLE // 2]
            if not len(real) or (real != real[0]).any():
                return None
            axes[dim], offset = np.zeros(1, dtype=np.int64), offset + int(real[0])
        return Numbers(tuple(axes), offset)

    def _collapsed_array(self, dims: tuple[int, ...]) -> Numbers | None:
        assert self.array is not None
        top = self.array.max(dims, keepdims=True)
        changes = ((self.array != top) & (self.array != NOTHING)).any()
        return None if changes else Numbers.of(top)

    def agreed(self, other: Numbers) -> Numbers | None:
        """The numbers of a sum of two values of one shape; None where different elements are added."""
        if self is other or self.key == other.key:
            return self
        mine, theirs = self.dense(), other.dense()
        if ((mine != theirs) & (mine != NOTHING) & (theirs != NOTHING)).any():
            return None
        return Numbers.of(np.where(mine == NOTHING, theirs, mine))


# By their keys, as long as a memory has them.
_shared: WeakValueDictionary[tuple[object, ...], Numbers] = WeakValueDictionary()


def joined(pieces: Sequence[Numbers], axis: int) -> Numbers | None:
    """The numbers of pieces one after another along an axis."""
    first = pieces[0]
    if all(piece.array is None for piece in pieces):
        others = [a.key for a in _without(first, axis)]
        if all([a.key for a in _without(piece, axis)] == others for piece in pieces[1:]):
            # Equal vectors but for what the axis itself and the offsets add.
            vector = np.concatenate([piece.axes[axis] + _shift(piece, first, axis) for piece in pieces])
            return Numbers((*first.axes[:axis], vector, *first.axes[axis + 1 :]), first.offset)
    return Numbers.of(np.concatenate([piece.dense() for piece in pieces], axis))


def _without(numbers: Numbers, axis: int) -> list[Numbers]:
    """The vectors of the other axes, each from its own largest number."""
    return [Numbers((v - v.max(initial=0),)) for dim, v in enumerate(numbers.axes) if dim != axis]


def _shift(piece: Numbers, first: Numbers, axis: int) -> int:
    def rest(numbers: Numbers) -> int:
        return numbers.offset + sum(int(v.max(initial=0)) for d, v in enumerate(numbers.axes) if d != axis)

    return rest(piece) - rest(first)


def _common_axes(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Axes of one shape, and sizes of another, that hold the same elements."""
    if not old or not new:
        return [(list(range(len(old))), list(new))]
    products = [list(accumulate(shape, mul)) for shape in (old, new)]
    found, i, j = list[tuple[list[int], list[int]]](), 0, 0
    for product in sorted(set(products[0]) & set(products[1])):
        to, end = (bisect_right(of, product) for of in products)
        found.append((list(range(i, to)), list(new[j:end])))
        i, j = to, end
    return found


def _split_axis(vector: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray] | None:
    """A vector as a sum of one an axis; None where it is none."""
    if len(sizes) == 1:
        return [vector]
    array = vector.reshape(tuple(sizes))
    if (array <= _HOLE // 2).any():
        return None
    origin = array[(0,) * len(sizes)]
    parts = [np.moveaxis(array, dim, 0).reshape(array.shape[dim], -1)[:, 0] for dim in range(len(sizes))]
    parts = [parts[0], *(part - origin for part in parts[1:])] if parts else []
    total = reduce(lambda a, b: a[..., None] + b, parts) if parts else vector.reshape(())
    return parts if np.array_equal(total, array) else None
