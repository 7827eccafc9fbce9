"""Where do memories that begin with one value part? Tracks that are never mixed again are memories of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from depthscope.probes.reading.branches import branches_of
from depthscope.probes.reading.graph import Graph, TracedValue
from depthscope.probes.reading.memory import Memory, start_of, without_forks, without_inner


def tracks(memory: Memory) -> list[Memory]:
    """The memory, or one for each track where several begin with one value and are never mixed, as in reversible blocks."""
    branches = branches_of(memory)
    if memory.carried[memory.root.number].count > memory.count:
        return [memory]  # which begins with several streams, each of which may be a track
    last = max((write.number for branch in branches for write in branch.writes), default=0)
    relevant = memory.back([memory.end, *(branch.read for branch in branches)]) - {memory.root.number}
    values, track = memory.graph.values, _Tracks()
    for number in sorted(n for n in relevant if n <= last):
        track.join(number, [p.number for p in memory.inside(values[number])])
    if any(len({track.of(w.number) for w in b.writes if w.number in track}) > 1 for b in branches):
        return [memory]  # of earlier outputs each is added to several sums, which branches read: a history
    writes: dict[int, set[int]] = {}
    for number in track:
        writes.setdefault(track.of(number), set()).update({number} & memory.writes.keys())
    if len(writes) < 2 or any(len(of) < 2 for of in writes.values()):
        return _with_side_tracks(memory, relevant, last)
    merges = {
        n
        for n in memory.trunk
        if n > last and len({track.of(p.number) for p in memory.inside(values[n]) if p.number in track}) > 1
    }
    everything = merges.union(*writes.values())
    return [without_inner(memory, everything - of) for of in writes.values()]


def _with_side_tracks(memory: Memory, relevant: set[int], last: int) -> list[Memory]:
    """The memory, and those that leave it for good at a later value, as a head of blocks of its own does.

    Where values are joined before the last write nothing is taken apart: what leaves comes back there.
    """
    values = memory.graph.values
    inside = {n: [p.number for p in memory.inside(values[n])] for n in sorted(relevant) if n <= last}
    if any(len(parents) > 1 for parents in inside.values()):
        return [memory]
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
        if len(ways) > 1 and values[number].shape == memory.root.shape:
            return _parted(memory, values[number], ways, last)
    return [memory]


def _parted(memory: Memory, fork: TracedValue, ways: list[set[int]], last: int) -> list[Memory]:
    """The memory with one of the ways after a value, and each of the others from that value on.

    It goes on to what lies in the container of the modules before, else to the most writes.
    """
    graph, written = memory.graph, set().union(*ways)
    containers = [_container(graph, n) for n in sorted(memory.back([fork]) & memory.writes.keys())]
    ways.sort(key=lambda way: (_container(graph, min(way)) in containers, len(way)), reverse=True)
    merges = {n for n in memory.trunk if n > last and len(memory.inside(graph.values[n])) > 1}
    main = without_inner(memory, merges | (written - ways[0]))
    start = replace(start_of(fork), functions=memory.start.functions)
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


class _Tracks(dict[int, int]):
    """Values by the first one of those with which they are joined; of each, one that is nearer to that."""

    def of(self, number: int) -> int:
        """The first value of the track of another one."""
        while self[number] != number:
            self[number] = self[self[number]]
            number = self[number]
        return number

    def join(self, number: int, parents: Sequence[int]) -> None:
        """Note a value that was made of some: all of their tracks are one from now on."""
        of = [self.of(parent) for parent in parents if parent in self]
        self[number] = min(of, default=number)
        self |= dict.fromkeys(of, self[number])
