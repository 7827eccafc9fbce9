"""Where do memories that begin with one value part? Tracks that are never mixed again are memories of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from depthscope.probes.reading.branches import branches_of
from depthscope.probes.reading.graph import Graph, TracedValue
from depthscope.probes.reading.memory import Memory, start_of, without_forks, without_inner


def tracks(memory: Memory) -> list[Memory]:
    """The memory, or one for each way on which it goes on for good from one value: reversible blocks, a head of blocks.

    Where values are joined before the last write nothing is taken apart: what leaves comes back there.
    """
    branches, values, root = branches_of(memory), memory.graph.values, memory.root
    if memory.carried[root.number].count > memory.count:
        return [memory]  # which begins with several streams, each of which may be a track
    last = max((write.number for branch in branches for write in branch.writes), default=0)
    relevant = memory.back([memory.end, *(branch.read for branch in branches)]) - {root.number}
    inside = {n: [p.number for p in memory.inside(values[n])] for n in sorted(relevant) if n <= last}
    if any(len(parents) > 1 for parents in inside.values()):
        return [memory]
    forks = ((of, ways) for of, ways in _forks(memory, inside) if values[of].shape == root.shape)
    number, ways = next(forks, (root.number, []))
    if any(sum(not way.isdisjoint(w.number for w in b.writes) for way in ways) > 1 for b in branches):
        return [memory]  # of earlier outputs each is added to several sums, which branches read: a history
    return _parted(memory, values[number], ways, last) if ways else [memory]


def _forks(memory: Memory, inside: Mapping[int, Sequence[int]]) -> Iterator[tuple[int, list[set[int]]]]:
    """The values that go on in several ways, each with some writes, and the writes of each way; the first value first.

    ``inside``: of which value each is carried.
    """
    takers: dict[int, list[int]] = {memory.root.number: []}
    writes: dict[int, set[int]] = {}  # of a value and of all that is carried from it
    for number, parents in inside.items():
        takers.setdefault(number, [])
        for parent in parents:
            takers.setdefault(parent, []).append(number)
    for number in sorted(takers, reverse=True):
        own = {number} & memory.writes.keys()
        writes[number] = own.union(*(writes[taker] for taker in takers[number]))
    for number in sorted(takers):
        ways = [writes[taker] for taker in takers[number] if len(writes[taker]) > 1]
        if len(ways) > 1:
            yield number, ways


def _parted(memory: Memory, fork: TracedValue, ways: list[set[int]], last: int) -> list[Memory]:
    """The memory with one of the ways after a value, and each of the others from that value on.

    It goes on to what lies in the container of the modules before, else to the most writes.
    """
    graph, written = memory.graph, set().union(*ways)
    containers = [_container(graph, n) for n in sorted(memory.back([fork]) & memory.writes.keys())]
    ways.sort(key=lambda way: (_container(graph, min(way)) in containers, len(way)), reverse=True)
    merges = {n for n in memory.trunk if n > last and len(memory.inside(graph.values[n])) > 1}
    main = without_inner(memory, merges | (written - ways[0]))
    start = memory.start if fork is memory.root else replace(start_of(fork), functions=memory.start.functions)
    sides = [
        without_forks(graph, replace(start, banned=memory.start.banned | merges | (written - way)))
        for way in ways[1:]
    ]
    return [main, *(track for side in sides for track in tracks(side))]


def _container(graph: Graph, number: int) -> str:
    """The module with numbered parts in one of which a value was made."""
    parts = graph.path(graph.values[number]).split(".")
    while parts and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts[:-1])
