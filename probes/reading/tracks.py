"""Which parts of a memory are memories of their own? Tracks that are never mixed again, a part of the depth with streams.

And which sums are none of its states?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from depthscope.probes.reading.branches import branches_of
from depthscope.probes.reading.graph import Graph, TracedValue
from depthscope.probes.reading.memory import Memory, Start, start_of, without_forks, without_inner
from depthscope.probes.reading.operations import JOINS, MOST_STREAMS, SUMS, moved


def after_spread(memory: Memory) -> Memory:
    """The memory from where its first value is spread over streams, if that is added to all of these again, as in a loop."""
    values, trunk = memory.graph.values, memory.trunk
    first = min(memory.writes.keys() & trunk, default=0)
    wide = [n for n in sorted(trunk) if n < first and memory.carried[n].count > memory.count]
    ends = [memory.end, *(read for branch in branches_of(memory) for read in branch.reads)] if wide else []
    number = next((n for n in wide if all(n in memory.back([end]) for end in ends)), None)
    if number is None or memory.root.number not in memory.back([memory.end], {number}):
        return memory  # nothing comes around it
    later = memory.graph.later(values[number])
    after = (values[n] for n in trunk if later[n] and n > number)
    joins = [of for of in after if not all(later[p.number] for p in memory.inside(of))]
    if all(of.name in SUMS and memory.carried[of.number].count > memory.count for of in joins):
        start = replace(memory.start, root=values[number], numbers=memory.carried[number])
        again = without_forks(memory.graph, start)
        return again if again.num_writes == memory.num_writes else memory
    return memory


def with_unread_streams(memory: Memory) -> Memory:
    """The memory with all streams of its last state, where what follows takes some of several values alone."""
    graph, branches = memory.graph, branches_of(memory)
    last = max((branch.read.number for branch in branches), default=0)
    later = [graph.values[number] for number in sorted(memory.carried) if number > last and branches]
    ends = [of for of in later if of.name not in JOINS and all(t.name in JOINS for t in graph.takers(of))]
    unread = [of for of in ends if not graph.reaches_output(of) and of not in moved(graph, of.parents[0])]
    relevant = memory.back([memory.end, *(branch.read for branch in branches)]) if unread else set[int]()

    def alive(moment: int) -> int:
        """How many elements are needed after a moment."""
        values = [graph.values[number] for number in relevant if number <= moment]
        later = {
            of for of in values if any(t.number > moment and t.number in relevant for t in graph.takers(of))
        }
        return sum(memory.carried[of.number].count for of in values if of in later or of is memory.end)

    written = max((write.number for branch in branches for write in branch.writes), default=0)
    missing = alive(last) - alive(written)
    if not unread or sum(memory.carried[of.number].count for of in unread) != missing:
        return memory
    return replace(memory, unread=unread, trunk=memory.trunk | memory.back(unread), branches=None)


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
    """The memory, or its parts with streams, which come first, and the parts with plain blocks before and after those.

    Everything goes through the value that begins a part, and branches of one with streams read one stream's worth of them.
    What is expanded again and again, as inside of each block, has no such part.
    """
    begins, starts = _parts_by_streams(memory), list[Start]()
    if not begins:
        return [memory]
    for first, after in zip(begins, [*begins[1:], None], strict=True):
        numbers, start = memory.carried[first.number], memory.start
        if numbers.count == memory.count and first is not memory.root:
            start = replace(start_of(first), functions=start.functions, banned=start.banned)
        start = replace(
            start, root=first, numbers=start.numbers if numbers.count == memory.count else numbers
        )
        starts.append(replace(start, banned=start.banned | {after.number}) if after is not None else start)
    parts = [part for part in (without_forks(memory.graph, of) for of in starts) if part.num_writes]
    parts.sort(key=lambda part: part.start.numbers.count == memory.count)
    return [part for part in parts if branches_of(part)] or [memory]


def _parts_by_streams(memory: Memory) -> list[TracedValue]:
    """The values with which parts begin that have another number of streams; empty where one number is that of all blocks."""
    passages = list(_passages(memory))
    sizes = [memory.carried[value.number].count for value in passages]
    begins = [at for at, size in enumerate(sizes) if not at or size != sizes[at - 1]]
    wide = [at for at in begins if sizes[at] > memory.count]
    others = [at for at in begins if at not in wide]
    if not wide or begins[0] in wide or len({sizes[at] for at in wide}) < len(wide) or len(others) > 2:
        return []
    if any(sizes[at] % memory.count or sizes[at] > MOST_STREAMS * memory.count for at in wide):
        return []
    depth = {at: memory.depth[passages[at].number] for at in range(len(passages))}
    if any(depth[at] != depth[at - 1] for at in wide):
        return []  # a history holds what branches gave in between
    merged = others[1] if len(others) > 1 else None
    if merged is not None and merged < wide[-1]:
        return []
    last = memory.depth[memory.end.number]
    if len(wide) == 1 and not depth[wide[0]] and (depth[merged] if merged is not None else last) == last:
        return []  # streams from the first block to the last one
    until = memory.end.number + 1 if merged is None else passages[merged].number
    inside = [b for b in branches_of(memory) if passages[wide[0]].number < b.source.number < until]
    reads = {memory.carried[branch.read.number].count for branch in inside}
    return [passages[at] for at in begins] if len(inside) > 1 and reads == {memory.count} else []


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
