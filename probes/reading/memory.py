"""What is carried linearly from one value, and which values may that be? A memory, and where branches write into it."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from depthscope.probes.reading.carrying import Carried, Rules, places_in
from depthscope.probes.reading.graph import LEAF, PARAMETER, Graph, TracedValue, walk
from depthscope.probes.reading.numbers import NOTHING, Numbers
from depthscope.probes.reading.operations import (
    FUNCTIONS,
    JOINS,
    MATRICES,
    MIXES,
    MOST_STREAMS,
    MOVES,
    PARTS,
    PRODUCTS,
    SAME,
    SCATTERS,
    SUMS,
    TURNS,
    VIEWS,
    ZEROS,
    addends,
    centred,
    is_statistic,
    linear_in,
    only_moves,
    spreads,
)  # fmt: skip

MOST_CANDIDATES = 14
MOST_FIRST = 6  # of each kind that may hold streams
# Of what weights made, or the model was called with.
FIRST_VALUES = ("mm", "addmm", "linear", "embedding", "bmm", LEAF)
FEW_STREAMS = 4  # of a parameter that mixes them; what is larger is taken for the weight of a layer here, and looked at later
PASSES = SAME | VIEWS | {*PRODUCTS}


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
    """The begin with a value whose streams lie along a part of an axis, of which each takes ``inner`` places in a row."""
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

    def may_join(piece: TracedValue, model: Numbers) -> bool:
        """Whether a piece may be a stream next to the memory: it comes from it or is a constant, and the memory is whole."""
        own = graph.depends(piece, root) or not graph.depends_on_input(piece)
        return own and model.distinct >= memory.count

    rules = Rules(graph, memory.carried, functions=start.functions, may_join=may_join)
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
    """The value after most writes that reaches the output, or that a last block hands on: the latest whole one, or any."""
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


def _be_born(memory: Memory, value: TracedValue, numbers: Numbers, depth: int) -> None:
    memory.carried[value.number], memory.depth[value.number] = numbers, depth + 1
    memory.born.add(value.number)
    memory.writes[value.number] = [value]


def _note_write(memory: Memory, value: TracedValue, inside: list[TracedValue]) -> None:
    """Note what a carried sum or join takes that was computed from the memory and is no part of it."""
    if value.name in JOINS:
        _note_pieces(memory, value, inside)
        return
    others = [v for v in addends(value) if not memory.holds(v)]
    new = [v for v in others if memory.graph.depends(_copied(v), memory.root)]
    if new and not memory.passes_function(value) and not _fills_empty_places(memory, value):
        memory.writes[value.number] = new
        memory.depth[value.number] += 1


def _copied(value: TracedValue) -> TracedValue:
    """What a value is a copy of: of what it was copied into nothing is left."""
    return _copied(value.parents[-1]) if value.name == "copy" else value


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


# --- with which values may a memory begin? Those to which more is added


def candidates(graph: Graph) -> tuple[list[TracedValue], list[TracedValue]]:
    """Values to which something computed from them is added, by the number of sums; the rest, as beginnings of tracks."""
    most = _Sums(graph).by_root()
    busiest = [number for number, _ in sorted(most.items(), key=lambda of: (-of[1], of[0]))]
    floats = [
        v.number for v in graph.values
        if v.name == "embedding" or (v.name == LEAF and v.kind != PARAMETER and v.is_floating and len(v.shape) > 1)
    ]  # fmt: skip
    first = dict.fromkeys([*busiest[:4], *sorted(most)[: MOST_CANDIDATES - 4], *floats[:4]])
    given = [v for v in _possible(graph, first) if graph.depends_on_input(v)]
    rest = [n for n in busiest if graph.values[n] not in given and most[n] > 1]
    return given, _possible(graph, rest)


def _possible(graph: Graph, numbers: Iterable[int]) -> list[TracedValue]:
    found = (graph.values[number] for number in dict.fromkeys(numbers))
    return [value for value in found if len(value.shape) > 1 and value.numel > 1]


class _Sums:
    """A rough pass over all values: from which root each is carried, through how many sums with what depends on it."""

    def __init__(self, graph: Graph):
        self._graph = graph
        self._root: dict[int, TracedValue] = {}
        self._merges: dict[int, int] = {}
        self._best: dict[int, int] = {}

    def by_root(self) -> dict[int, int]:
        """The most sums by the number of the root."""
        for value in self._graph.values:
            self._root[value.number], self._merges[value.number] = value, 0
            carrier, merged = self._carrier(value) if value.parents else (None, False)
            if carrier is not None:
                root = self._root[value.number] = self._root[carrier.number]
                merges = self._merges[value.number] = self._merges[carrier.number] + merged
                if merged:
                    self._best[root.number] = max(self._best.get(root.number, 0), merges)
        return self._best

    def _carrier(self, value: TracedValue) -> tuple[TracedValue | None, bool]:
        operands = [p for p in value.parents if p.is_floating and p.kind != PARAMETER]
        if not operands or any(spreads(value, operand) for operand in operands):
            return None, False
        if operands[0].of_parameter and value.parents == (operands[0],) and value.numel > operands[0].numel:
            return None, False  # latents that are learned, once for each sequence
        if value.name in FUNCTIONS:  # a memory may begin with what one gives, where what it takes is gone
            return (operands[0] if Graph.is_kept(operands[0]) else None), False
        if only_moves(value) or value.name in TURNS:
            return operands[0], False
        mixes = value.name in MIXES and not self._is_of_layer(value)
        if value.name in PRODUCTS or mixes:
            # Of a gate and what it scales, that which comes from further back; of a matrix of streams, what it is made of.
            made_of = [a for a in operands if mixes and any(self._is_added(a, b) for b in operands)]
            return max(
                made_of or operands,
                key=lambda p: (self._merges[p.number], p.numel, -self._root[p.number].number),
            ), False
        empty = ZEROS if value.name in SCATTERS else ()  # as a buffer, before anything is written into it
        added = [p for p in dict.fromkeys(addends(value)) if p in operands and p.name not in empty]
        if len(added) < 2:
            return (added[0] if added else None), False
        depending = [a for a in added if any(self._is_added(a, b) for b in added)]
        # Where each depends on the other's root, as a gated output and a gated state do: what comes from further back.
        both = len(depending) > 1
        carrier = max(
            depending or added,
            key=lambda a: (self._merges[a.number], -self._root[a.number].number if both else 0),
        )
        if not depending and self._is_put_together(value, added, carrier):
            return None, False
        return carrier, bool(depending)

    def _is_put_together(self, value: TracedValue, parts: list[TracedValue], carrier: TracedValue) -> bool:
        """Whether a value is made of several parts, none of which was computed from another, and begins anew."""
        root = self._root[carrier.number]
        if value.name == "cat":  # as a class token and patches
            return len({self._root[part.number] for part in parts}) > 1
        # As of a block with a shortcut of its own, whose output was put together of parts.
        return root.numel < value.numel and all(map(self._graph.depends_on_input, parts))

    def _is_of_layer(self, value: TracedValue) -> bool:
        if value.name == "convolution":
            return value.args[-1] > 1 or max(value.args[1].shape[:2]) > FEW_STREAMS
        return value.name in MATRICES and any(map(self._is_layer, value.parents))

    def _is_layer(self, value: TracedValue) -> bool:
        """Whether a factor is a parameter or computed from such alone, as a normalised one, and no matrix of a few streams."""
        is_large = min(value.shape[-2:], default=0) > FEW_STREAMS
        return is_large and (value.of_parameter or not self._graph.depends_on_input(value))

    def _is_added(self, a: TracedValue, b: TracedValue) -> bool:
        """Whether one addend was computed from the root of the other, and not carried from it."""
        root, b = self._root[a.number], _copied(b)
        return a is not b and self._root[b.number] is not root and self._graph.depends(b, root)


def folded_beginnings(graph: Graph) -> list[tuple[TracedValue, int, int, int]]:
    """Values that may hold streams: the axis of features, which is taken apart later, how many, and the places of each."""
    found: list[tuple[TracedValue, int, int, int]] = []
    # What a weight made, its axis of features, and into how many parts this is taken apart, by what is viewed of it.
    made: dict[int, tuple[TracedValue, int, int]] = {}
    first: Counter[bool] = Counter()  # by whether it is an image
    for value in _tensors(graph):
        is_image = value.name == "convolution"
        if (value.name in FIRST_VALUES or is_image) and len(value.shape) > 1:
            first[is_image] += 1
            if first[False] > MOST_FIRST:
                break
            if first[is_image] <= MOST_FIRST:
                made[value.number] = value, 1 if is_image else len(value.shape) - 1, 1
            continue
        passes = only_moves(value) or value.name == "add"
        known = made.get(value.parents[0].number) if value.parents and passes else None
        if known is None:
            continue
        origin, axis, parts = known
        width, at = origin.shape[axis] // parts, 1 if origin.name == "convolution" else len(value.shape) - 1
        if len(value.shape) > at and value.shape[at] == width:
            made[value.number] = known
        elif more := _takes_apart(value, at, width):
            made[value.number] = origin, axis, parts * more  # of streams, and of fractions of each
            width = origin.shape[axis] // (parts * more)
            # The parts of the axis as its streams; or the places of each of the last ones, where they are fewer
            as_streams = (origin, axis, parts * more, width), (origin, axis, parts * width, 1)
            found += as_streams[: 1 + (width < more)]
    return list(dict.fromkeys(found))[:12]


def _tensors(graph: Graph) -> Iterator[TracedValue]:
    return (v for v in graph.values if v.is_floating and v.shape and (v.parents or graph.depends_on_input(v)))


def _takes_apart(value: TracedValue, axis: int, width: int) -> int:
    """Into how many parts a view, or a cut, takes an axis of some width apart; 0 where it does not."""
    shape, before = value.shape, value.parents[0].shape
    first = axis if axis == 1 and len(shape) > len(before) else axis - 1  # of the two that a view makes of it
    if value.name in VIEWS and len(shape) > 2 and math.prod(shape[first : first + 2]) == width:
        parts = shape[first]
    elif (
        value.name in PARTS
        and (*before[:axis], *before[axis + 1 :]) == (*shape[:axis], *shape[axis + 1 :])
        and len(before) == len(shape)
        and shape[axis]
        and not width % shape[axis]
    ):
        parts = width // shape[axis]
    else:
        return 0
    # Of one feature each they are coefficients.
    return parts if 1 < parts <= min(MOST_STREAMS, width - 1) else 0
