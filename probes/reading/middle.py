"""Where does a memory have streams in a part of the depth alone? Plain blocks before or after it are memories of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from depthscope.probes.reading.branches import branches_of
from depthscope.probes.reading.graph import TracedValue
from depthscope.probes.reading.memory import Memory, start_of, without_forks
from depthscope.probes.reading.operations import MOST_STREAMS


def with_streams_apart(memory: Memory) -> list[Memory]:
    """The memory, or its part with streams, which comes first, and the parts with one stream before and after that.

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
