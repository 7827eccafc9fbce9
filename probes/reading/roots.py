"""With which values may a memory begin, and which further ones does it begin with? Those to which more is added."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from depthscope.probes.reading.branches import branches_of
from depthscope.probes.reading.graph import LEAF, PARAMETER, Graph, TracedValue, walk
from depthscope.probes.reading.memory import Memory, follow
from depthscope.probes.reading.numbers import Numbers
from depthscope.probes.reading.operations import (
    FUNCTIONS,
    MATRICES,
    MIXES,
    MOST_STREAMS,
    PARTS,
    PRODUCTS,
    SAME,
    SCATTERS,
    TURNS,
    VIEWS,
    ZEROS,
    addends,
    only_moves,
    spreads,
)  # fmt: skip

MOST_CANDIDATES = 14
MOST_FIRST = 6  # of each kind that may hold streams
# Of what weights made, or the model was called with.
FIRST_VALUES = ("mm", "addmm", "linear", "embedding", "bmm", LEAF)
FEW_STREAMS = 4  # of a parameter that mixes them; what is larger is taken for the weight of a layer here, and looked at later
PASSES = SAME | VIEWS | {*PRODUCTS}


def candidates(graph: Graph) -> tuple[list[TracedValue], list[TracedValue]]:
    """Values to which something computed from them is added: most sums first, then the earliest, then embeddings; the rest.

    Among the rest are constants, with which the state of a track begins.
    """
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
        root = self._root[a.number]
        while b.name == "copy":  # of what it was copied into nothing is left
            b = b.parents[-1]
        return a is not b and self._root[b.number] is not root and self._graph.depends(b, root)


def folded_beginnings(graph: Graph) -> list[tuple[TracedValue, int, int, int]]:
    """Values that may hold streams from the beginning: the axis of the features, which is taken apart later; how many.

    Last is how many places of the axis each stream takes in a row.
    """
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
            found += _as_streams(*made[value.number], more)
    return list(dict.fromkeys(found))[:12]


def _as_streams(
    origin: TracedValue, axis: int, parts: int, more: int
) -> Iterator[tuple[TracedValue, int, int, int]]:
    """The parts of an axis as its streams; or the places of each of the ``more`` last ones, where they are fewer."""
    width = origin.shape[axis] // parts
    yield origin, axis, parts, width
    if width < more:
        yield origin, axis, parts // more * width, 1


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


def with_further_beginnings(memory: Memory) -> Memory:
    """The memory with further first values: added to it as streams are, by several sums of the first connection, never later.

    What is added by one sum alone, as positions are, is a part of the first value; what later blocks add again, as a
    condition is, is no stream.
    """
    branches = branches_of(memory)
    if not branches:
        return memory
    first, *others = sorted(branches, key=lambda branch: branch.writes[0].number)
    until = max(write.number for write in first.writes)
    if others:  # the streams of the first connection are made when the next branch reads them
        until = max(until, min(branch.read.number for branch in others) - 1)
    found: dict[int, Numbers] = {}
    for number, sums in _sums_with_others(memory, until).items():
        value = memory.graph.values[number]
        same = [n for n in sorted(sums) if memory.graph.values[n].shape == value.shape]
        if len(sums) > 1 and same and _is_beginning(memory, value, until):
            found[number] = memory.carried[same[0]]
    if not found:
        return memory
    return follow(memory.graph, replace(memory.start, others=found))


def _sums_with_others(memory: Memory, until: int) -> dict[int, set[int]]:
    """By value that is no part of the memory: the sums of the memory, up to a number, to which it is added."""
    sums: dict[int, set[int]] = {}
    for number in sorted(of for of in memory.carried if of <= until):
        value = memory.graph.values[number]
        for addend in addends(value):
            if not memory.holds(addend):
                for origin in _scaled(addend):
                    sums.setdefault(origin.number, set()).add(number)
    return sums


def _scaled(value: TracedValue) -> Iterator[TracedValue]:
    """A value and what it is a copy of, a view, or a product with weights."""
    yield value
    while value.name in PASSES and (of := [p for p in value.parents if p.is_floating]):
        value = max(of, key=lambda parent: parent.numel)
        yield value


def _is_beginning(memory: Memory, value: TracedValue, until: int) -> bool:
    """Whether a value is like the first one, and needed for the first connection alone."""
    graph, root = memory.graph, memory.root
    if value.numel != root.numel or graph.depends(value, root):
        return False
    ways = walk([value], lambda of: (t for t in graph.takers(of) if t.name in PASSES and not memory.holds(t)))
    return all(taker.number <= until for way in ways for taker in graph.takers(way))
