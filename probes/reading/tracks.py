"""Which parts of a memory are memories of their own? Tracks that are never mixed again, a part of the depth with streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from depthscope.probes.reading.branches import branches_of
from depthscope.probes.reading.graph import Graph, TracedValue
from depthscope.probes.reading.memory import Memory, start_of, without_forks, without_inner
from depthscope.probes.reading.operations import MOST_STREAMS


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


def with_streams_apart(memory: Memory) -> list[Memory]:
    """The memory, or its part with streams, which comes first, and the parts with plain blocks before and after that.

    Everything goes through the value that begins a part, and branches between the first and the last value with streams read
    one stream's worth of them. What is expanded again and again, as inside of each block, has no such part.
    """
    found = _wide_part(memory)
    if found is None:
        return [memory]
    graph, start, (first, merged) = memory.graph, memory.start, found
    end = frozenset() if merged is None else frozenset({merged.number})
    wide = replace(start, root=first, numbers=memory.carried[first.number], banned=start.banned | end)
    starts = [wide, replace(start, banned=start.banned | {first.number})]
    if merged is not None:
        starts.append(replace(start_of(merged), functions=start.functions, banned=start.banned))
    parts = [without_forks(graph, of) for of in starts]
    return (
        [part for part in parts if part.num_writes and branches_of(part)]
        if branches_of(parts[0])
        else [memory]
    )


def _wide_part(memory: Memory) -> tuple[TracedValue, TracedValue | None] | None:
    """The first value with streams, and the one into which they are merged; None where a memory has no such part."""
    passages = list(_passages(memory))
    sizes = [memory.carried[value.number].count for value in passages]
    wide = [at for at, size in enumerate(sizes) if size > memory.count]
    if not wide or sizes[0] != memory.count or set(sizes) != {memory.count, sizes[wide[0]]}:
        return None
    if sizes[wide[0]] % memory.count or sizes[wide[0]] > MOST_STREAMS * memory.count:
        return None
    first = wide[0]
    after = next((at for at, size in enumerate(sizes) if at > first and size == memory.count), None)
    is_spread = memory.depth[passages[first].number] == memory.depth[passages[first - 1].number]
    if not is_spread or (after is not None and after < wide[-1]):
        return None  # a history holds what branches gave in between
    merged = None if after is None else passages[after]
    until = memory.end.number + 1 if merged is None else merged.number
    depths = [memory.depth[of.number] for of in (passages[first], merged or memory.end, memory.end)]
    if not depths[0] and depths[1] == depths[2]:
        return None  # streams from the first block to the last one
    inside = [
        branch for branch in branches_of(memory) if passages[first].number < branch.source.number < until
    ]
    reads = [memory.carried[branch.read.number].count for branch in inside]
    return (passages[first], merged) if len(inside) > 1 and set(reads) == {memory.count} else None


def _passages(memory: Memory) -> Iterator[TracedValue]:
    """The values of the trunk through which everything goes, in their order: no step leads past them."""
    furthest = -1
    values, reach = memory.graph.values, dict[int, int]()
    for number in sorted(memory.trunk):
        for parent in memory.inside(values[number]):
            reach[parent.number] = number
    for number in sorted(memory.trunk):
        if furthest <= number:
            yield values[number]
        furthest = max(furthest, reach.get(number, number))
