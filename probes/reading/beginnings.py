"""Which further values does a memory begin with? Streams that are tensors of their own, or features that come later."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from depthscope.probes.reading.branches import branches_of
from depthscope.probes.reading.graph import TracedValue, walk
from depthscope.probes.reading.memory import Memory, Start, start_that_grows, without_forks
from depthscope.probes.reading.numbers import Numbers
from depthscope.probes.reading.operations import PRODUCTS, SAME, VIEWS, addends
from depthscope.probes.reading.states import feature_axis

PASSES = SAME | VIEWS | {*PRODUCTS}


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
    for number in [n for n in found if not found.keys().isdisjoint(_origins(memory, n))]:
        del found[number]  # a copy of another one
    if not found:
        return memory
    return without_forks(memory.graph, replace(memory.start, others=found))


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


def starts_that_grow(memories: Iterable[Memory]) -> list[Start]:
    """Memories whose features grow, where a plain one ends at a join of its features with others made of it."""
    found: dict[TracedValue, Start] = {}
    for memory in memories:
        for read, join in memory.leaves:
            if join.name != "cat" or memory.root in found or not memory.is_whole(read):
                continue
            axis = (join.args[1] if len(join.args) > 1 else 0) % len(join.shape)
            others = [piece for piece in addends(join) if not memory.holds(piece)]
            if not others or not all(memory.graph.depends(piece, memory.root) for piece in others):
                continue
            if memory.carried[read.number].step(axis) == math.prod(memory.shape[feature_axis(memory) + 1 :]):
                found[memory.root] = start_that_grows(memory.graph, memory.root, feature_axis(memory))
    return list(found.values())


def _scaled(value: TracedValue) -> Iterator[TracedValue]:
    """A value and what it is a copy of, a view, or a product with weights."""
    yield value
    while value.name in PASSES and (of := [p for p in value.parents if p.is_floating]):
        value = max(of, key=lambda parent: parent.numel)
        yield value


def _origins(memory: Memory, number: int) -> set[int]:
    return {origin.number for origin in _scaled(memory.graph.values[number])} - {number}


def _is_beginning(memory: Memory, value: TracedValue, until: int) -> bool:
    """Whether a value is like the first one, and needed for the first connection alone."""
    graph, root = memory.graph, memory.root
    if value.numel != root.numel or graph.depends(value, root):
        return False
    ways = walk([value], lambda of: (t for t in graph.takers(of) if t.name in PASSES and not memory.holds(t)))
    return all(taker.number <= until for way in ways for taker in graph.takers(way))
