"""Where is something added to what it was computed from? Every residual of a forward, whatever memory it belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise

from depthscope.probes.reading.description import MemoryReading
from depthscope.probes.reading.graph import Graph, TracedValue
from depthscope.probes.reading.operations import LAYERS, MOVES, PRODUCTS, SAME, addends, weights

# Heuristic: a single residual outside of the states is named from this share of the parameters on, inside of a branch from
# the other; several that follow one another always.
OUTSIDE_SHARE, INSIDE_SHARE = 0.1, 0.5
SUMS = ("add", "sub", "stack")


def residual_branch(graph: Graph, value: TracedValue, after: TracedValue | None = None) -> set[int]:
    """What layers computed from a value, and is as large as it, where both are added or put next to each other; else nothing.

    ``value``: the sum, or the history that grows. ``after``: what the value that is added to has to be computed from.
    """
    if value.name not in SUMS:
        return set()
    added = addends(value)
    pairs = [*pairwise(added)]
    if len(added) == 2 and value.name != "stack":
        pairs.append((added[1], added[0]))
    for begin, other in pairs:
        if after is None or graph.depends(begin, after):
            branch = _computed_from(graph, begin, other)
            if branch:
                return branch
    return set()


def _computed_from(graph: Graph, begin: TracedValue, other: TracedValue) -> set[int]:
    """What layers computed from one value, up to another one as large; empty where none did."""
    while len(begin.parents) == 1 and any(begin.name in group for group in (SAME, MOVES, PRODUCTS)):
        begin = begin.parents[0]  # what is added to may be a view of what the branch takes, or scaled
    if begin.numel < other.numel or len(begin.shape) < 2 or begin.kind or not graph.depends(other, begin):
        return set()
    behind, later = graph.earlier([other], {begin.number}), graph.later(begin)
    branch = {number for number in range(begin.number, other.number + 1) if behind[number] and later[number]}
    working = branch & weights(graph).keys()
    return branch if any(graph.values[number].name in LAYERS for number in working) else set()


@dataclass(frozen=True)
class FurtherResiduals:
    """Residuals, each computed from others of them, that are none of the states that are read.

    ``sums``: how many. ``path``: the module in which the first one is added up. ``names``: of the parameters that work in
    what they add. ``around``: of those of the branches of states in which they lie; empty where they lie in none.
    """

    sums: int
    path: str
    names: frozenset[str]
    around: frozenset[str]


def further_residuals(
    graph: Graph, read: Sequence[MemoryReading], blocks: AbstractSet[str]
) -> Iterator[FurtherResiduals]:
    """The residuals outside of some memories and blocks: several that follow each other, or one with many of the parameters.

    ``blocks``: paths of modules that are described as they are, with all that is in them.
    """
    held = set[int]().union(*(memory.held for memory in read))
    ends, carried = _ends_of_branches(graph, read, held)
    later = [graph.later(graph.values[memory.root]) for memory in read]
    behind = graph.earlier(ends, carried)
    for group in _linked_sums(graph, held, blocks):
        inside = [n for n in group if behind[n] and any(of[n] for of in later)]
        around_ends = [next(end for end in ends if graph.depends(end, graph.values[n])) for n in inside]
        marks = graph.earlier(around_ends, carried)
        around = {n for n, marked in enumerate(marks) if marked and any(of[n] for of in later)}
        names, around_names = (_parameters(graph, of) for of in (set().union(*group.values()), around))
        if len(group) > 1 or _share(graph, names) > (INSIDE_SHARE if inside else OUTSIDE_SHARE):
            yield FurtherResiduals(len(group), graph.path(graph.values[min(group)]), names, around_names)


def _linked_sums(graph: Graph, held: set[int], blocks: AbstractSet[str]) -> list[dict[int, set[int]]]:
    """The residuals outside of some values and blocks with their branches; together those computed from each other there."""
    groups: list[dict[int, set[int]]] = []
    for value in graph.values:
        if value.name not in SUMS or value.number in held or not graph.reaches_output(value):
            continue
        if not blocks.isdisjoint(graph.calls[call].path for call in graph.stack(value)):
            continue
        if branch := residual_branch(graph, value):
            marks = graph.earlier([value], held)
            linked = [group for group in groups if any(marks[number] for number in group)]
            groups = [group for group in groups if group not in linked]
            groups.append(
                {number: of for group in linked for number, of in group.items()} | {value.number: branch}
            )
    return groups


def _ends_of_branches(
    graph: Graph, read: Iterable[MemoryReading], held: set[int]
) -> tuple[list[TracedValue], set[int]]:
    """What is added to memories or weighs them, in order; and the values that these carry, but for it."""
    sources = {b.way[0] for memory in read for c in memory.connections for b in c.branches}
    begins = {memory.root for memory in read}
    taken = {parent.number for n in held - begins for parent in graph.values[n].parents}
    return [graph.values[n] for n in sorted(sources | taken - held)], held - sources


def _parameters(graph: Graph, numbers: set[int]) -> frozenset[str]:
    """The names of the parameters that work in some values."""
    found = weights(graph)
    of = {weight.number for number in numbers & found.keys() for weight in found[number]}
    return frozenset(graph.parameter_names.get(number, "") for number in of)


def _share(graph: Graph, names: AbstractSet[str]) -> float:
    """What some parameters are of all that the forward took."""
    sizes = {name: graph.values[number].numel for number, name in graph.parameter_names.items()}
    return sum(sizes.get(name, 0) for name in names) / max(sum(sizes.values()), 1)
