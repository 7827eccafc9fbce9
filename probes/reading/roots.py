"""With which value does a memory begin, and which of several memories is the model's?

The rule: of all memories that have a write, the one between whose first and last value the largest share of the weights
works; of equal ones (within 5 %) the one whose first value is the largest, then the one with most writes, then the earliest.
Others, whose values are apart from it and that lie in no branch of it, are further memories.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from depthscope.probes.reading.branches import branches_of, hidden_sums
from depthscope.probes.reading.graph import LEAF, PARAMETER, Graph, ReadingError, Value
from depthscope.probes.reading.memory import Memory, without_forks, without_inner
from depthscope.probes.reading.operations import (
    FUNCTIONS,
    JOINS,
    MOVES,
    PRODUCTS,
    REDUCES,
    SAME,
    SUMS,
    VIEWS,
    addends,
    weights_of,
)  # fmt: skip

MOST_CANDIDATES = 14
MOST_STREAMS = 64
NO_MEMORY = "nothing that is computed from a value is added to it: no residual network"


@dataclass
class Ranked:
    """A memory and what decides which is taken."""

    memory: Memory
    share: float  # of the weights

    @property
    def rank(self) -> tuple[object, ...]:
        """The larger, the better."""
        memory = self.memory
        steps = round(20 * self.share)
        return steps, memory.count, memory.num_writes, not memory.functions, -memory.root.number


def memories(graph: Graph) -> list[Memory]:
    """The memories of a forward: the model's, and further ones in the order of their ranks."""
    ranked = _ranked(graph, _candidates(graph))
    if not ranked:
        raise ReadingError(NO_MEMORY)
    found = _tracks(_with_hidden_sums(ranked[0].memory))
    taken = [(memory, branches_of(memory)) for memory in found]
    for other in ranked[1:]:
        if other.share < 0.002 or any(other.memory.trunk & known.trunk for known in found):
            continue
        branches = branches_of(other.memory)
        if branches and not any(_nested(graph, (other.memory, branches), one) for one in taken):
            found.append(other.memory)
            taken.append((other.memory, branches))
    return found


def _nested(graph: Graph, one, other) -> bool:  # type: ignore[no-untyped-def]
    """Whether one of two memories lies inside of a branch of the other one."""
    for (inner, _), (outer, branches) in ((one, other), (other, one)):
        if graph.depends(inner.root, outer.root) and any(
            graph.depends(b.source, inner.root) for b in branches
        ):
            return True
    return False


def _with_hidden_sums(memory: Memory) -> Memory:
    """The memory followed again, where sums that begin anew hide branches from it."""
    seeds: dict = {}
    for _ in range(4):
        new = {
            number: found
            for number, found in hidden_sums(memory, branches_of(memory)).items()
            if number not in seeds
        }
        if not new:
            break
        seeds |= new
        again = without_forks(memory.graph, memory.root, functions=memory.functions, seeds=seeds)
        if not set(seeds) & again.trunk:
            break
        memory = again
    return memory


def _tracks(memory: Memory) -> list[Memory]:
    """The memory, or one for each track where several begin with one value and are never mixed, as in reversible blocks."""
    branches = branches_of(memory)
    last = max((write.number for branch in branches for write in branch.writes), default=0)
    relevant = memory.back([memory.end, *(branch.read for branch in branches)]) - {memory.root.number}
    track: dict[int, int] = {}
    for number in sorted(n for n in relevant if n <= last):
        joined = {track[p.number] for p in memory.inside(memory.graph.values[number]) if p.number in track}
        own = min(joined, default=number)
        track |= {n: own for n, of in track.items() if of in joined}
        track[number] = own
    writes = {
        name: {n for n, of in track.items() if of == name and n in memory.writes} for name in track.values()
    }
    if len(writes) < 2 or any(len(of) < 2 for of in writes.values()):
        return [memory]
    merges = {
        n
        for n in memory.trunk
        if n > last and len({track.get(p.number) for p in memory.inside(memory.graph.values[n])}) > 1
    }
    everything = merges.union(*writes.values())
    return [without_inner(memory, everything - of) for of in writes.values()]


def _ranked(graph: Graph, roots: list[Value]) -> list[Ranked]:
    found: list[Ranked] = []
    for root in roots:  # grows while it is gone through
        plain = without_forks(graph, root)
        passing = without_forks(graph, root, functions=True)
        both = [Ranked(memory, _share(memory)) for memory in (plain, passing)]
        found += both
        if max(of.share for of in both) < 0.6 and len(roots) < 2 * MOST_CANDIDATES:
            roots += [value for value in _breaks(plain) if value not in roots][:2]
    if max((of.share for of in found), default=0) < 0.4:
        for root, streams in _folded_beginnings(graph):
            memory = without_forks(graph, root, streams=streams)
            found.append(Ranked(memory, _share(memory)))
    return sorted((of for of in found if of.memory.num_writes), key=lambda of: of.rank, reverse=True)


def _breaks(memory: Memory) -> list[Value]:
    """Where tokens were mixed or joined, another memory may begin."""
    found = [v for _, v in memory.leaves if v.name in JOINS or v.name in SUMS]
    return [v for v in found if v.numel >= memory.count]


def _share(memory: Memory) -> float:
    """The share of the weights that work between a memory's first and last value."""
    graph, used = memory.graph, set()
    seen = {memory.end.number}
    waiting = [memory.end]
    while waiting:
        value = waiting.pop()
        used.update(weights_of(value))
        for parent in value.parents:
            if parent.number not in seen and parent is not memory.root and graph.depends(parent, memory.root):
                seen.add(parent.number)
                waiting.append(parent)
    total = sum(graph.values[number].numel for number in graph.parameter_names)
    return sum(v.numel for v in used) / max(total, 1)


def _candidates(graph: Graph) -> list[Value]:
    """Values to which something computed from them is added: most sums first, then the earliest, then embeddings."""
    most = _Sums(graph).by_root()
    count = lambda of: (-of[1], of[0])  # noqa: E731
    busiest = [number for number, _ in sorted(most.items(), key=count)[:4]]
    floats = [
        v.number for v in graph.values
        if v.name == "embedding" or (v.name == LEAF and v.kind != PARAMETER and v.is_floating and len(v.shape) > 1)
    ]  # fmt: skip
    numbers = [*busiest, *sorted(most)[: MOST_CANDIDATES - 4], *floats[:4]]
    found = [graph.values[number] for number in dict.fromkeys(numbers)]
    return [v for v in found if len(v.shape) > 1 and v.numel > 1 and graph.depends_on_input(v)]


class _Sums:
    """A rough pass over all values: from which root each is carried, through how many sums with what depends on it."""

    def __init__(self, graph: Graph):
        self._graph = graph
        self._root: dict[int, Value] = {}
        self._merges: dict[int, int] = {}
        self._best: dict[int, int] = {}

    def by_root(self) -> dict[int, int]:
        """The most sums by the number of the root."""
        for value in self._graph.values:
            self._root[value.number], self._merges[value.number] = value, 0
            carrier, merged = self._carrier(value)
            if carrier is not None:
                root = self._root[value.number] = self._root[carrier.number]
                merges = self._merges[value.number] = self._merges[carrier.number] + merged
                if merged:
                    self._best[root.number] = max(self._best.get(root.number, 0), merges)
        return self._best

    def _carrier(self, value: Value) -> tuple[Value | None, bool]:
        operands = [p for p in value.parents if p.is_floating and p.kind != PARAMETER]
        if not operands:
            return None, False
        if value.name in SAME or value.name in MOVES or value.name in FUNCTIONS:
            return operands[0], False
        if value.name in PRODUCTS or value.name in REDUCES:
            return max(operands, key=lambda p: (self._merges[p.number], p.numel)), False
        added = [p for p in addends(value) if p in operands]
        if len(added) < 2:
            return (added[0] if added else None), False
        depending = [a for a in added if any(self._is_added(a, b) for b in added)]
        if value.name == "cat" and not depending and len({self._root[a.number] for a in added}) > 1:
            return None, False
        return max(depending or added, key=lambda a: self._merges[a.number]), bool(depending)

    def _is_added(self, a: Value, b: Value) -> bool:
        """Whether one addend was computed from the root of the other, and not carried from it."""
        root = self._root[a.number]
        return a is not b and self._root[b.number] is not root and self._graph.depends(b, root)


def _folded_beginnings(graph: Graph) -> list[tuple[Value, int]]:
    """Values that may hold streams from the beginning, and how many: a later view takes their last axis apart."""
    found: list[tuple[Value, int]] = []
    made: dict[int, Value] = {}  # what a weight made, by what is viewed of it
    for value in graph.values:
        if value.name == LEAF or not value.is_floating or not value.shape:
            continue
        if value.name in ("mm", "addmm", "embedding", "bmm") and len(value.shape) > 1:
            if len(set(made.values())) > 5:
                break
            made[value.number] = value
        elif value.parents and (value.name in MOVES or value.name in SAME or value.name == "add"):
            origin = made.get(value.parents[0].number)
            if origin is None:
                continue
            if value.shape[-1] == origin.shape[-1]:
                made[value.number] = origin
            elif _takes_apart(value, origin.shape[-1]):
                found.append((origin, value.shape[-2]))
    return list(dict.fromkeys(found))[:12]


def _takes_apart(value: Value, width: int) -> bool:
    shape: Sequence[int] = value.shape
    return (
        value.name in VIEWS
        and len(shape) > 2
        and math.prod(shape[-2:]) == width
        and 1 < shape[-2] <= MOST_STREAMS
    )
