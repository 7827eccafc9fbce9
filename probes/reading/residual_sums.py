"""Where is something added to what it was computed from? Every residual of a forward, whatever memory it belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise

from depthscope.probes.reading.description import MemoryReading
from depthscope.probes.reading.graph import Graph, TracedValue, names, walk
from depthscope.probes.reading.operations import (
    JOINS,
    LAYERS,
    MATRICES,
    MOST_STREAMS,
    MOVES,
    PRODUCTS,
    REDUCES,
    SAME,
    SCATTERS,
    SUMS,
    TURNS,
    addends,
    weights,
)  # fmt: skip

# Heuristic: a single residual outside of the states is named from this share of the parameters on, inside of a branch from
# the other; several that follow one another always.
OUTSIDE_SHARE, INSIDE_SHARE = 0.1, 0.5
PLAIN = names("add sub stack")
ADDED = (PLAIN | {*SUMS, *SCATTERS}) - names("copy masked_fill")
LINEAR = SAME | MOVES | TURNS | PRODUCTS.keys()  # what carries what it takes, each alone or weighed by a gate


def residual_branch(
    graph: Graph,
    value: TracedValue,
    after: TracedValue | None = None,
    held: AbstractSet[int] | None = None,
    known: AbstractSet[int] = frozenset(),
) -> set[int]:
    """What layers computed from a value, and is as large as it, where both are added or put next to each other; else nothing.

    ``value``: the sum, or the history that grows. ``after``: what the value that is added to has to be computed from.
    ``held``: the values of memories; what is added to is then followed back through mixtures too, as of streams, where none
    of these lies between. ``known``: sums at which that ends.
    """
    is_plain = value.name in PLAIN
    if not is_plain and (held is None or not (value.name in ADDED or _grows(graph, value))):
        return set()
    added = addends(value)
    pairs = [*pairwise(added)]
    if len(added) == 2 and value.name != "stack":
        pairs.append((added[1], added[0]))
    found = set[int]()
    for begin, other in pairs:
        if not other.shape or (after is not None and not graph.depends(begin, after)):
            continue
        if found and value.name not in JOINS:
            break
        new = _branch_between(graph, walk([begin], _moved), other) if is_plain and not found else set()
        if not new and held is not None:
            ways = _carriers(begin, other, held | known)
            new = _branch_between(graph, ways, other, held)
        found |= new
    return found


def _grows(graph: Graph, value: TracedValue) -> bool:
    """Whether one more value is joined to a history of them, or further features to what was joined before."""
    parts = addends(value) if value.name == "cat" else []
    if len(parts) < 2:
        return False
    axis = (value.args[1] if len(value.args) > 1 else value.kwargs.get("dim", 0)) % len(value.shape)
    # An empty vector may be joined to what has more axes.
    one_more = len(value.shape) > 2 and any(part.shape[axis : axis + 1] == (1,) for part in parts)
    return one_more or any(part.name == "cat" for part in parts)


def _moved(value: TracedValue) -> Sequence[TracedValue]:
    """What a value is a view of, or what it scales."""
    return value.parents if len(value.parents) == 1 and value.name in LINEAR else ()


def _carriers(begin: TracedValue, other: TracedValue, until: AbstractSet[int]) -> Iterator[TracedValue]:
    """What a value carries, as far as it is as large as another one and up to some values, the nearest first."""

    def before(value: TracedValue) -> list[TracedValue]:
        found = _carried(value, other.shape[-1]) if value.number not in until else []
        return [of for of in found if of.numel >= other.numel]

    return walk([begin], before)


def _branch_between(
    graph: Graph, begins: Iterable[TracedValue], other: TracedValue, stop: AbstractSet[int] = frozenset()
) -> set[int]:
    """What layers computed from the first of some values from which they did, up to one that is no larger; else nothing."""
    for begin in begins:
        if begin.numel < other.numel or len(begin.shape) < 2 or begin.kind or not graph.depends(other, begin):
            continue
        behind, later = graph.earlier([other], stop | {begin.number}), graph.later(begin)
        numbers = range(begin.number, other.number + 1)
        branch = {number for number in numbers if behind[number] and later[number]}
        if any(graph.values[number].name in LAYERS for number in branch & weights(graph).keys()):
            return branch
    return set()


def _carried(value: TracedValue, width: int) -> list[TracedValue]:
    """What a value is linear in, each of its features by itself: what was moved, weighed, added up, or mixed as streams."""
    if value.name in SUMS or value.name in JOINS:
        return addends(value)
    if value.name in MATRICES:
        mixing = [set(of.shape[-2:]) for of in value.parents if of.of_parameter]
        is_layer = any(len(of) > 1 or max(of) > MOST_STREAMS or width in of for of in mixing)
        return [] if is_layer else list(value.parents)
    weighed = value.name in REDUCES and value.parents[0].name in PRODUCTS
    return list(value.parents) if weighed or value.name in LINEAR else []


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
    sources = {branch.source.number for memory in read for branch in memory.branches}
    taken = {of.number for n in held - {memory.root for memory in read} for of in graph.values[n].parents}
    # What is added to memories or weighs them, in order; and the values that these carry, but for it.
    ends, carried = [graph.values[n] for n in sorted(sources | taken - held)], held - sources
    later = [graph.later(graph.values[memory.root]) for memory in read]
    behind = graph.earlier(ends, carried)
    for group in _linked_sums(graph, held, blocks):
        inside = [n for n in group if behind[n] and any(of[n] for of in later)]
        around_ends = [next(end for end in ends if graph.depends(end, graph.values[n])) for n in inside]
        marks = graph.earlier(around_ends, carried)
        around = {n for n, marked in enumerate(marks) if marked and any(of[n] for of in later)}
        own, others = (_parameters(graph, of) for of in (set().union(*group.values()), around))
        if len(group) > 1 or _share(graph, own) > (INSIDE_SHARE if inside else OUTSIDE_SHARE):
            yield FurtherResiduals(len(group), graph.path(graph.values[min(group)]), own, others)


def _linked_sums(graph: Graph, held: set[int], blocks: AbstractSet[str]) -> list[dict[int, set[int]]]:
    """The residuals outside of some values and blocks with their branches; together those computed from each other there."""
    groups: list[dict[int, set[int]]] = []
    known = set[int]()
    for value in graph.values:
        if value.number in held or not graph.reaches_output(value):
            continue
        if not blocks.isdisjoint(graph.calls[call].path for call in graph.stack(value)):
            continue
        if branch := residual_branch(graph, value, held=held, known=known):
            known.add(value.number)
            marks = graph.earlier([graph.values[max(branch)]], held)
            linked = [group for group in groups if any(marks[number] for number in group)]
            groups = [group for group in groups if group not in linked]
            groups.append(
                {number: of for group in linked for number, of in group.items()} | {value.number: branch}
            )
    return groups


def _parameters(graph: Graph, numbers: set[int]) -> frozenset[str]:
    """The names of the parameters that work in some values."""
    found = weights(graph)
    of = {weight.number for number in numbers & found.keys() for weight in found[number]}
    return frozenset(graph.parameter_names.get(number, "") for number in of)


def _share(graph: Graph, names: AbstractSet[str]) -> float:
    """What some parameters are of all that the forward took."""
    sizes = {name: graph.values[number].numel for number, name in graph.parameter_names.items()}
    return sum(sizes.get(name, 0) for name in names) / max(sum(sizes.values()), 1)
