"""What is carried linearly from one value? The memory, and where branches write into it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from depthscope.probes.reading.carrying import Carried, MayJoin, Rules, places_in
from depthscope.probes.reading.graph import PARAMETER, Graph, TracedValue, walk
from depthscope.probes.reading.numbers import NOTHING, Numbers
from depthscope.probes.reading.operations import (
    FUNCTIONS,
    JOINS,
    MIXES,
    MOVES,
    PRODUCTS,
    SCATTERS,
    SUMS,
    addends,
    centred,
    is_statistic,
    linear_in,
    only_moves,
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """How a memory begins, and what is known of it from an earlier pass."""

    root: TracedValue  # the first value
    shape: tuple[int, ...]  # of one stream of it
    numbers: Numbers  # of its elements
    functions: bool = False  # whether norms and activations are passed, as in post-norm blocks
    banned: frozenset[int] = frozenset()  # numbers of values that are opaque
    # Branch outputs that the memory keeps as they are, although it is joined by sums of them only later.
    seeds: Mapping[int, Numbers] = field(default_factory=dict)
    # Further first values, each a stream of the first state
    others: Mapping[int, Numbers] = field(default_factory=dict)


@dataclass
class Memory:
    """What is carried from one value, the root; all by the numbers of values."""

    graph: Graph
    start: Start
    carried: Carried = field(default_factory=dict)  # where the elements of the first value are
    depth: dict[int, int] = field(default_factory=dict)  # how many writes lie on the longest way to a value
    writes: dict[int, list[TracedValue]] = field(default_factory=dict)  # what branches add, by the sum
    # Carried, taken by what is opaque
    leaves: list[tuple[TracedValue, TracedValue]] = field(default_factory=list)
    born: set[int] = field(default_factory=set)  # branch outputs that are kept next to the memory as they are
    end: TracedValue = None  # type: ignore[assignment]  # the last value of the longest way
    unread: list[TracedValue] = field(default_factory=list)  # streams of the last state that nothing takes
    trunk: set[int] = field(default_factory=set)  # the values on the ways to the end, and to those
    branches: list[Any] | None = None  # once they were looked for

    @property
    def root(self) -> TracedValue:
        """The first value."""
        return self.start.root

    @property
    def begins(self) -> set[int]:
        """The numbers of all first values."""
        return {self.root.number, *self.start.others}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one stream of the first value."""
        return self.start.shape

    @property
    def count(self) -> int:
        """How many elements one stream has."""
        return self.start.numbers.distinct

    @property
    def num_writes(self) -> int:
        """How many writes follow each other on the longest way."""
        return self.depth[self.end.number]

    @property
    def ends(self) -> list[TracedValue]:
        """The last value, and the streams of the last state that nothing takes."""
        return [self.end, *self.unread]

    def holds(self, value: TracedValue) -> bool:
        """Whether a value is a part of the memory."""
        return value.number in self.carried

    def inside(self, value: TracedValue) -> list[TracedValue]:
        """The values of the memory that a value of it carries on."""
        if value is self.root or value.number in self.born or value.number in self.start.others:
            return []
        return [operand for operand in linear_in(value) if operand.number in self.carried]

    def line(self, value: TracedValue) -> Iterator[TracedValue]:
        """A value and, the latest first, those that it is carried from, as far as each is carried from one alone."""
        yield value
        while len(inside := self.inside(value)) == 1:
            (value,) = inside
            yield value

    def after(self, value: TracedValue) -> Iterator[TracedValue]:
        """The values of the trunk that follow one, as long as one alone is made of each."""
        while len(takers := [of for of in self.graph.takers(value) if of.number in self.trunk]) == 1:
            (value,) = takers
            yield value

    def back(self, ends: Collection[TracedValue], stop: Collection[int] = ()) -> set[int]:
        """The values of the memory that come into some of its values, after those with numbers in ``stop``."""

        def counted(values: Iterable[TracedValue]) -> list[TracedValue]:
            return [value for value in values if value.number not in stop]

        return {v.number for v in walk(counted(ends), lambda value: counted(self.inside(value)))}

    def is_whole(self, value: TracedValue) -> bool:
        """Whether a value has every token and feature of the memory."""
        numbers = self.carried[value.number]
        return numbers.count >= self.count and numbers.distinct >= self.count

    def mixes(self, value: TracedValue) -> bool:
        """Whether an operation joins several values or streams of the memory, or leaves some out."""
        inside = self.inside(value)
        if len(inside) != 1 or value.name in MIXES:
            return True
        return value.name in MOVES and value.numel < inside[0].numel

    def mixed_between(self, first: TracedValue, last: TracedValue) -> bool:
        """Whether, on the ways from one value to another, other values of the memory or constants are added."""
        reached = {first.number}
        for number in sorted(self.back([last], range(first.number + 1))):
            value = self.graph.values[number]
            if any(parent.number in reached for parent in self.inside(value)):
                reached.add(number)
                if self.mixes(value) and not only_moves(value) and value.name not in JOINS:
                    return True
                if self.adds_constant(value) and number not in self.writes:
                    return True
        return False

    def adds_constant(self, value: TracedValue) -> bool:
        """Whether an operation adds to the memory what is not computed from it."""
        return len(addends(value)) > len(self.inside(value))

    def passes_function(self, value: TracedValue) -> bool:
        """Whether a step is a norm or an activation of the memory itself."""
        if value.name in FUNCTIONS:
            return True
        inside = self.inside(value)
        if value.name in SUMS:
            return bool(centred(value, inside))
        if value.name not in PRODUCTS or not inside:
            return False
        others = [v for v in value.parents if v is not inside[0]]
        return any(is_statistic(self.graph, other, inside[0]) for other in others)


def start_of(root: TracedValue) -> Start:
    """A memory's begin with a value of one stream."""
    return Start(root, root.shape, Numbers.first(root.shape).shared())


def start_with_streams(root: TracedValue, axis: int, streams: int = 0, inner: int = 1) -> Start:
    """A memory's begin with a value that has its streams along an axis of their own, or along a part of one.

    ``streams``: how many there are; 0 for as many as the axis is long.
    ``inner``: how many places of the axis each stream takes in a row.
    """
    length = root.shape[axis]
    outer = length // (inner * (streams or length))
    shape = (*root.shape[:axis], *[outer * inner] * (outer * inner > 1), *root.shape[axis + 1 :])
    one = Numbers.first(shape)
    place = np.arange(length)
    place = place // (length // outer) * inner + place % inner
    along = place * math.prod(root.shape[axis + 1 :])
    after = one.axes[axis + (outer * inner > 1) :]
    return Start(root, shape, Numbers((*one.axes[:axis], along, *after)).shared())


def follow(graph: Graph, start: Start, until: int | None = None) -> Memory:
    """The memory that begins so; ``until`` is the number of the last value that is looked at."""
    root = start.root
    memory = Memory(graph, start)
    memory.carried[root.number], memory.depth[root.number] = start.numbers, 0
    rules = Rules(graph, memory.carried, functions=start.functions, may_join=_joining(memory))
    memory.carried |= start.others
    memory.depth |= dict.fromkeys(start.others, 0)
    waiting = [*start.seeds]
    waiting += [taker.number for first in memory.begins for taker in graph.takers(graph.values[first])]
    heapq.heapify(waiting)
    number = root.number
    while waiting and (until is None or waiting[0] <= until):
        number, last = heapq.heappop(waiting), number
        if number == last:
            continue
        value = graph.values[number]
        new = _followed(memory, rules, value)
        for taker in (taker for of in new for taker in graph.takers(of)):
            if taker.number > number:
                heapq.heappush(waiting, taker.number)
    memory.end = _end(memory)
    memory.trunk = memory.back([memory.end])
    return memory


def _followed(memory: Memory, rules: Rules, value: TracedValue) -> list[TracedValue]:
    """Note whether a value is carried, and what is new in the memory by that."""
    number, start = value.number, memory.start
    inside = [p for p in value.parents if p.number in memory.carried]
    numbers = rules.numbers(value) if inside and number not in start.banned else None
    if numbers is None and number in start.seeds:
        _be_born(memory, value, start.seeds[number], 0)
        return [value]
    if numbers is None:
        memory.leaves += [(parent, value) for parent in inside]
        return []
    memory.carried[number] = numbers
    memory.depth[number] = max(memory.depth[p.number] for p in inside)
    _note_write(memory, value, inside)
    return [value, *(p for p in value.parents if p.number in memory.born)]


def _end(memory: Memory) -> TracedValue:
    """The value after most writes: of those that reach the output, or that a last block hands on and nobody reads.

    The latest one that has every token and feature; the latest of all, where none has.
    """
    graph = memory.graph
    values = [graph.values[number] for number in memory.carried]
    written = [value for value in values if memory.depth[value.number]]
    # What a block hands on that weights made which work nowhere else is a state, as the last text state of two streams.
    ends = [
        v for v in written
        if graph.reaches_output(v) or (v.number in graph.handed_on and _has_own_weights(graph, v))
    ]  # fmt: skip
    ends = ends or [v for v in written if _has_own_weights(graph, v)]
    most = max((memory.depth[value.number] for value in ends), default=0)
    latest = [value for value in ends if memory.depth[value.number] == most]
    whole = [value for value in latest if memory.is_whole(value)]
    return max(whole or latest or [memory.root], key=lambda value: value.number)


def _has_own_weights(graph: Graph, value: TracedValue) -> bool:
    """Whether a value that does not reach the output was made by a parameter that works in nothing that does."""
    made_by = walk([value], lambda of: (p for p in of.parents if not graph.reaches_output(p)))
    return any(of.kind == PARAMETER and not graph.reaches_output(of) for of in made_by)


def _joining(memory: Memory) -> MayJoin:
    """Whether a piece may lie next to the memory as a stream: it comes from it or is a constant, and the memory is whole."""
    graph, root = memory.graph, memory.root

    def may_join(piece: TracedValue, model: Numbers) -> bool:
        own = graph.depends(piece, root) or not graph.depends_on_input(piece)
        return own and model.distinct >= memory.count

    return may_join


def _be_born(memory: Memory, value: TracedValue, numbers: Numbers, depth: int) -> None:
    memory.carried[value.number], memory.depth[value.number] = numbers, depth + 1
    memory.born.add(value.number)
    memory.writes[value.number] = [value]


def _note_write(memory: Memory, value: TracedValue, inside: list[TracedValue]) -> None:
    """Note what a carried sum or join takes that was computed from the memory and is no part of it."""
    if value.name in JOINS:
        _note_pieces(memory, value, inside)
        return
    new = [v for v in addends(value) if not memory.holds(v) and memory.graph.depends(v, memory.root)]
    if new and not memory.passes_function(value) and not _fills_empty_places(memory, value):
        memory.writes[value.number] = new
        memory.depth[value.number] += 1


def _fills_empty_places(memory: Memory, value: TracedValue) -> bool:
    """Whether something is written where a value, as a buffer, holds nothing yet: the memory is added to it later."""
    if value.name not in SCATTERS or memory.carried[value.number].count == value.numel:
        return False
    places = places_in(memory.graph, value, value.args[SCATTERS[value.name][-1]])
    held = memory.carried[value.number].dense()
    return places is not None and bool((held[places.dense() != NOTHING] == NOTHING).all())


def _note_pieces(memory: Memory, value: TracedValue, inside: list[TracedValue]) -> None:
    depth, begin = max(memory.depth[p.number] for p in inside), 0
    axis = (value.args[1] if len(value.args) > 1 else value.kwargs.get("dim", 0)) % len(value.shape)
    for piece in addends(value):
        size = 1 if value.name == "stack" else piece.shape[axis]
        part = begin if value.name == "stack" else slice(begin, begin + size, 1)
        begin += size
        if memory.holds(piece) or not piece.numel or not memory.graph.depends(piece, memory.root):
            continue
        numbers = memory.carried[value.number].take(axis, part)
        if not numbers.count:
            continue
        _be_born(memory, piece, numbers, depth)
        memory.depth[value.number] = max(memory.depth[value.number], depth + 1)
