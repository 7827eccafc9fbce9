"""Which values are the states? What is alive between a write of one branch and the read of the next one."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from depthscope.probes.reading.branches import Branch
from depthscope.probes.reading.graph import TracedValue
from depthscope.probes.reading.memory import Memory
from depthscope.probes.reading.operations import JOINS, MATRICES, NORMS, only_moves

Cut = list[TracedValue]


@dataclass(frozen=True)
class Cuts:
    """The states of a memory: the values of each, or the reads of a history of states."""

    cuts: list[Cut]
    over_depth: bool


def cuts_of(
    memory: Memory, branches: list[Branch], layers: Sequence[int], scaling: Iterable[Sequence[int]] = ()
) -> Cuts:
    """The states: all that later steps need of the memory, at the moments between branches, whose blocks have numbers.

    ``scaling``: the values of blocks that only scale the memory, and of steps between two blocks, with own states.
    """
    life = _Life(memory, branches, layers, list(scaling))
    cuts = life.cuts()
    sizes = [size_of(memory, cut) for cut in cuts]
    # The first state may be one value that is copied for each of several streams, as into a list, of which branches read sums.
    alive = {value.number for cut in cuts[1:] for value in cut}
    is_list = len(sizes) > 2 and sizes[0] < sizes[1] and not any(b.read.number in alive for b in branches)
    # Or branches read one of the streams, of which each goes on from the first, and every step makes new ones: of a history
    # some values are kept, and others begin as what a branch gives.
    everything = [value.number for cut in cuts for value in cut]
    renewed = len(sizes) > 3 and sizes[0] < sizes[1] and len(set(everything)) == len(everything)
    renewed &= all(len(cut) > 1 for cut in cuts[1:])
    is_list |= renewed and all(not memory.begins.isdisjoint(memory.back([value])) for value in cuts[1])
    # A value that waits while two others are written is no stream, but an earlier state that is read again.
    waits = any(set(a) & set(b) & set(c) for a, b, c in zip(cuts, cuts[1:], cuts[2:], strict=False))
    return Cuts(cuts, waits or len(set(sizes[is_list:])) > 1)


def size_of(memory: Memory, cut: Cut) -> int:
    """How many elements some values hold; the rest of a buffer, in which nothing was written yet, is none."""
    return sum(memory.carried[value.number].count for value in cut)


def last_read(memory: Memory, branches: list[Branch]) -> TracedValue:
    """The last value of the memory that is not yet normed or merged for the head, nor cut to some of the tokens."""
    last = max(write.number for branch in branches for write in branch.writes)
    for value in memory.line(memory.end):
        if value.number <= last or (memory.mixes(value) and memory.is_whole(value)):
            break
    return value


class _Life:
    """When each value of a memory is needed for the last time."""

    def __init__(
        self, memory: Memory, branches: list[Branch], layers: Sequence[int], scaling: list[Sequence[int]]
    ):
        self.memory, self.branches, self.layers = memory, branches, layers
        self.scaling = scaling
        self._scaled = {number: at for at, of in enumerate(scaling) for number in of}
        values = memory.graph.values
        self.relevant = memory.back([*memory.ends, *(branch.read for branch in branches)])
        self.takers: dict[int, list[TracedValue]] = {number: [] for number in self.relevant}
        for number in sorted(self.relevant):
            for parent in memory.inside(values[number]):
                self.takers[parent.number].append(values[number])
        self.last: dict[int, float] = {
            n: max((t.number for t in of), default=0) for n, of in self.takers.items()
        }
        self.readers = {branch.read.number for branch in branches}
        self.writes = sorted({write.number for branch in branches for write in branch.writes})
        self._first_writes = sorted(min(write.number for write in branch.writes) for branch in branches)
        self._first_taken: dict[int, int] = {}  # by value: the first that takes it out of the memory
        for read, taker in memory.leaves:
            self._first_taken[read.number] = min(
                taker.number, self._first_taken.get(read.number, taker.number)
            )
        self.until = [self._until(branch) for branch in branches]
        for branch, until in zip(branches, self.until, strict=True):
            self.last[branch.read.number] = max(self.last[branch.read.number], until)
        self.last |= {end.number: math.inf for end in memory.ends}
        self._born = sorted(self.relevant)
        self._sizes, self._counts = self._alive_after_each()
        self._trunk = sorted(memory.trunk)
        self._alive, self._seen = list[int](), 0  # of those made before the last moment that was asked for

    def _alive_after_each(self) -> tuple[np.ndarray, np.ndarray]:
        """How many elements, and how many values, are alive after each value."""
        changes = np.zeros((2, len(self.memory.graph.values) + 2), dtype=np.int64)
        for number in self.relevant:
            size = self.memory.carried[number].count, 1
            gone = math.ceil(min(max(self.last[number], number), changes.shape[1] - 1))
            changes[:, number] += size
            changes[:, gone] -= size
        sizes, counts = changes.cumsum(1)
        return sizes, counts

    def _until(self, branch: Branch) -> float:
        """The moment of a branch's read: of a state itself when it is taken, as other streams may be made until then."""
        if branch.before <= branch.read.number:
            return branch.before
        taken = [
            self._first_taken.get(read.number, 0)
            for read in branch.reads
            if read.number >= branch.read.number
        ]
        at = bisect_right(self._first_writes, branch.before)
        first = min([*taken, *self._first_writes[at : at + 1]], default=0)
        return max(branch.before, first - 0.5)

    def times(self) -> list[tuple[int, float]]:
        """Moments: after which write, and before which read."""
        times: dict[int, float] = {}
        root = max(self.memory.begins)
        for until in self.until:
            at = bisect_right(self.writes, until)
            time = max(root, self.writes[at - 1]) if at else root
            times[time] = min(until, times.get(time, until))
        times.setdefault(self.writes[-1], self.memory.end.number + 0.5)
        known = sorted(times)
        for write, until in self._unread():
            at = bisect_left(known, write)
            if at == len(known) or known[at] >= until:
                times[write] = until
        for numbers in self.scaling:
            known = sorted(times)
            before = known[max(bisect_left(known, numbers[0]) - 1, 0)]
            if before < numbers[0] and numbers[-1] < times[before]:
                times[numbers[-1]], times[before] = times[before], numbers[0]
        return sorted(times.items())

    def _unread(self) -> list[tuple[int, float]]:
        """After which blocks no branch reads before the next block writes: their states are there all the same."""
        pairs = zip(self.branches, self.layers, strict=True)
        ordered = sorted(pairs, key=lambda of: of[0].writes[0].number)
        found = []
        for (before, layer), (branch, other) in pairwise(ordered):
            write, until = before.writes[-1].number, branch.writes[0].number
            if layer != other and branch.source.number > write and write in self.memory.trunk:
                found.append((write, float(until)))
        return found

    def cuts(self) -> list[Cut]:
        """The values alive where fewest are, between each write and the next read."""
        found: list[Cut] = []
        sizes: list[int] = []
        patterns: dict[tuple[str, ...], None] = {}  # what is done to states after the writes before them
        wider: Cut = []
        for time, until in self.times():
            last = time == self.writes[-1]
            if last:
                live, size = self._at_end(time, until, sizes, len(found[-1]) if found else 1)
            else:
                counted = self._moments(time, until)
                moment, size = min(counted, key=lambda of: (of[1], self._counts[of[0]]))
                live = self._live(moment)
            sizes.append(size)
            moved = [self.advanced(value, last, patterns) for value in live]
            if time == max(self.memory.begins):
                wider = list(dict.fromkeys(self.advanced(v, last, patterns, widen=True)[0] for v in live))
            found.append(list(dict.fromkeys(value for value, _ in moved)))
            if time != max(self.memory.begins):
                patterns[max((names for _, names in moved), key=len, default=())] = None
        self._widen_first(found, wider)
        return [cut for cut, before in zip(found, [None, *found], strict=False) if cut != before]

    def _spread(self, until: float, following: Cut) -> Cut:
        """The values before the first read of which each is the first one again or scaled, and a stream; empty for none.

        ``following``: the next state, into which each of them comes, as into the first read.
        """
        memory, alive, found = self.memory, list[TracedValue](), list[TracedValue]()
        reads = [branch.read for branch in self.branches if branch.before == until]
        streams = memory.back(following) & memory.back(reads)
        for number in self._born[: bisect_left(self._born, until)]:
            alive = [other for other in alive if self.last[other.number] > number]
            alive.append(memory.graph.values[number])
            if size_of(memory, alive) == size_of(memory, following) and all(
                value.number in streams and not memory.depth[value.number] and memory.is_whole(value)
                for value in alive
            ):
                found = alive  # the latest ones: before that the first value itself may wait to be scaled once more
        return found

    def _widen_first(self, found: list[Cut], wider: Cut) -> None:
        """The first state is as wide as the others, where the first value is only spread over streams after it."""
        first = size_of(self.memory, found[0])
        others = min((size_of(self.memory, cut) for cut in found[1:]), default=first)
        if first < size_of(self.memory, wider) <= others:
            found[0] = wider
        elif first < others:
            found[0] = self._spread(min(branch.before for branch in self.branches), found[1]) or found[0]

    def _moments(self, time: int, until: float) -> list[tuple[int, int]]:
        """Moments of the trunk, and how many elements are alive after each."""
        trunk = self._trunk
        between = trunk[bisect_right(trunk, time) : bisect_left(trunk, until)]
        return [(moment, int(self._sizes[moment])) for moment in (time, *between)]

    def _at_end(self, time: int, until: float, known: list[int], count: int) -> tuple[Cut, int]:
        """The values of the last state: as many elements as usual, in as many values as before, if there is such a moment.

        ``known``: the sizes of the states before.
        ``count``: how many values the one before has.
        """
        # The smallest size that occurred twice.
        usual = min((of for of in known if known.count(of) > 1), default=known[-1] if known else 0)
        moments = self._moments(time, until)
        same = [of for of in moments if of[1] == usual] or moments[:1]
        first = min(same, key=lambda of: (self._counts[of[0]] != count, self._counts[of[0]]))
        mixed = [of for of in same if of[0] > time and self.memory.graph.values[of[0]].name in MATRICES]
        moment, size = max([first, *mixed])  # mixed after the last write
        return self._live(moment), size

    def _live(self, moment: int) -> Cut:
        """What is needed after a moment; moments are asked for in order."""
        end = bisect_right(self._born, moment)
        waiting = [*self._alive, *self._born[self._seen : end]]
        self._alive = [number for number in waiting if self.last[number] > moment]
        self._seen = end
        return [self.memory.graph.values[number] for number in self._alive]

    def advanced(
        self, value: TracedValue, last: bool, patterns: Collection[Sequence[str]], *, widen: bool = False
    ) -> tuple[TracedValue, tuple[str, ...]]:
        """Forward while a value goes to one step alone that does not mix it; at the end only as after the writes before.

        Where a block hands one of them on, to that one.
        """
        way = [value]
        while len(self.takers[way[-1].number]) == 1 and way[-1].number not in self.readers:
            (step,) = self.takers[way[-1].number]
            if not self._is_passive(way[-1], step, widen):
                break
            way.append(step)
        handed = [n for n, v in enumerate(way) if v.number in self.memory.graph.handed_on]
        made_in = self.memory.graph.path(way[-1]).split(".")
        if value is self.memory.root and not any(map(str.isdigit, made_in)):
            handed = []  # what gave it is no block, where more is done to it before the first one
        way = self._until_first_block(way) if value is self.memory.root else way
        names = [step.name for step in way[1:]]
        usual = max((_common_length(names, of) for of in patterns), default=0)
        if last:  # the block that hands the last state on contains the sum; the norm of the head does not
            shown, around = self.memory.graph.shown, self._in_last_block(value)
            given = [n for n in handed if any(s.call in around for s in shown.get(way[n].number, ()))]
            handed = [n for n in handed if n <= usual] or given[:1]
        if handed and not widen:
            way = way[: handed[-1] + 1]
        elif last:
            way = way[: 1 + usual]
        else:  # without what only puts it into another order, as the next block does
            while (
                len(way) > 1
                and (way[-1].numel, way[-1].dtype) == (way[-2].numel, way[-2].dtype)
                and only_moves(way[-1])
            ):
                way.pop()
        return way[-1], tuple(step.name for step in way[1:])

    def _until_first_block(self, way: Cut) -> Cut:
        """The way of the first value as far as what the first block takes, where that begins with a norm."""
        block, shown = self.branches[0].unit, self.memory.graph.shown
        taken = [(block, "input") in [of[:2] for of in shown.get(value.number, ())] for value in way]
        return way[: taken.index(True) + 1] if any(taken) and way[-1].name in NORMS else way

    def _in_last_block(self, value: TracedValue) -> set[int]:
        """The calls around a value that have no write of an earlier block."""
        pairs = zip(self.branches, self.layers, strict=True)
        earlier = [branch.writes[0] for branch, layer in pairs if layer != max(self.layers)]
        stack = self.memory.graph.stack
        return set(stack(value)).difference(*map(stack, earlier[:1]))

    def _is_passive(self, value: TracedValue, step: TracedValue, widen: bool) -> bool:
        memory = self.memory
        if self._scaled.get(step.number) not in (None, self._scaled.get(value.number)):
            return False
        if step.number in memory.writes or len(memory.inside(step)) != 1:
            return False
        wider = step.numel > value.numel and not widen
        return not wider and (not memory.mixes(step) or step.name in JOINS)


def _common_length(names: Sequence[str], usual: Sequence[str]) -> int:
    """How many of the first names are among the usual ones, each as often as there."""
    left = list(usual)
    for length, name in enumerate(names):
        if name not in left:
            return length
        left.remove(name)
    return len(names)
