"""Which of several memories is the model's? The rule, and what is taken as a further one.

The rule: of all memories that have a write, the one between whose first and last value the largest share of the weights
works that any of them has there (a large head tells nothing); of equal ones (within 5 %) the one whose first value is the
largest, then the one with most writes, then the earliest. Norms and activations lie on a memory only where more of the
weights (5 %) work on it with them. Others, whose values are apart from it and that lie in no branch of it, are further
memories.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from depthscope.probes.reading.branches import branches_of, hidden_sums
from depthscope.probes.reading.graph import Graph, ReadingError, TracedValue, walk
from depthscope.probes.reading.memory import (
    FEW_STREAMS,
    MOST_CANDIDATES,
    PASSES,
    Memory,
    Start,
    candidates,
    folded_beginnings,
    follow,
    start_of,
    start_with_streams,
)
from depthscope.probes.reading.numbers import NOTHING, Numbers
from depthscope.probes.reading.operations import (
    FUNCTIONS,
    JOINS,
    LAYERS,
    MATRICES,
    MOST_STREAMS,
    NORMS,
    REDUCES,
    SUMS,
    VIEWS,
    addends,
    centred,
    is_unknown,
    moved,
    named,
    weights,
)  # fmt: skip
from depthscope.probes.reading.states import has_feature_axis

LEAST_SHARE = 0.002  # of the weights
MOST_FURTHER = 24
NO_MEMORY = "no residual stream was found: no value is carried on through sums to which something computed from it is added"


@dataclass
class Ranked:
    """A memory and what decides which is taken."""

    memory: Memory
    used: set[TracedValue]  # the weights that work between its first and last value
    share: float = 0.0  # of all that any memory has
    # Of its first value, without what an earlier memory only has there several times, as streams.
    size: int = 0

    @property
    def rank(self) -> tuple[object, ...]:
        """The larger, the better."""
        memory = self.memory
        steps = round(20 * self.share)
        return (
            steps,
            self.size or memory.count,
            memory.num_writes,
            not memory.start.functions,
            -memory.root.number,
        )


def memories(graph: Graph) -> list[Memory]:
    """What is carried through a forward: the model's memory, then further ones by rank."""
    first, rest = candidates(graph)
    learned = [value for value in rest[:MOST_FURTHER] if value.of_parameter]  # as latents are
    ranked = _ranked(graph, first) or _ranked(graph, learned)
    if not ranked:
        raise ReadingError(NO_MEMORY + _unknown(graph))
    everything = set[TracedValue]().union(*(of.used for of in ranked))
    best = with_further_beginnings(_within_long_skip(graph, ranked).memory)
    first_memory = _with_hidden_sums(_after_first_norm(after_spread(_with_empty_streams(best))))
    parts = with_streams_apart(with_unread_streams(first_memory))
    _take(graph, parts, ranked[1:])
    for root in rest[:MOST_FURTHER]:  # of another tower, whose first value is not among the first of all
        if not any(memory.holds(root) for memory in parts):
            _take(graph, parts, _with_shares([_larger(_of_root(graph, root))], everything))
    return parts


def _within_long_skip(graph: Graph, ranked: Sequence[Ranked]) -> Ranked:
    """The first memory; one with more writes, if that lies inside of the first's only branch or around its begin."""
    best = ranked[0]
    if best.memory.num_writes > 1:
        return best
    for other in ranked[1:]:
        is_large = other.memory.num_writes > 1 and other.share > best.share / 2
        if is_large and branches_of(other.memory) and _nested(graph, other.memory, best.memory):
            return other
    return best


def _unknown(graph: Graph) -> str:
    """Operations of which nothing is known, among which the sums may be."""
    found = dict.fromkeys(named(graph, value) for value in graph.values if is_unknown(value))
    if found:
        return f"; nothing is known of {', '.join(list(found)[:3])}, which may hide the sums"
    is_complex = any(value.dtype.is_complex for value in graph.values)
    return "; complex numbers are not followed, which may hide the sums" if is_complex else ""


def _take(graph: Graph, taken: list[Memory], ranked: Sequence[Ranked]) -> None:
    """Take the memories that are apart from those taken, at least until they are added to these, and in no branch of them."""
    for other in ranked:
        apart = not any(other.memory.trunk & known.trunk for known in taken)
        is_state = other.memory.num_writes and graph.depends_on_input(other.memory.end)
        if other.share < LEAST_SHARE or not is_state or not apart:
            continue
        branches = branches_of(other.memory)
        if not all(other.memory.trunk.intersection(w.number for w in b.writes) for b in branches):
            continue  # no chain: as a bias of attention, to which the scores of each block are added apart
        if branches and not any(_nested(graph, other.memory, known) for known in taken):
            taken.append(other.memory)


def _nested(graph: Graph, one: Memory, other: Memory) -> bool:
    """Whether all that is added to one of two memories lies inside of a branch of the other one."""
    for inner, outer in ((one, other), (other, one)):
        first = graph.values[min(inner.writes.keys() & inner.trunk, default=inner.root.number)]
        if graph.depends(first, outer.root) and any(
            graph.depends(b.source, inner.end) and graph.depends(first, b.read) for b in branches_of(outer)
        ):
            return True
    return False


def _after_first_norm(memory: Memory) -> Memory:
    """The memory from the norm on with which its embedding ends, where none comes between its writes."""
    values, trunk = memory.graph.values, sorted(memory.trunk - {memory.root.number} - memory.born)
    passed = [number for number in trunk if memory.passes_function(values[number])]
    begin = [number for number in passed if not memory.depth[number]]
    if memory.num_writes < 2 or not begin or any(0 < memory.depth[n] < memory.num_writes for n in passed):
        return memory
    first = values[begin[-1]]
    if first.numel != memory.root.numel or memory.root.number in memory.back([memory.end], {first.number}):
        return memory
    return follow(memory.graph, start_of(first))


def _with_hidden_sums(memory: Memory) -> Memory:
    """The memory followed again, where sums that begin anew hide branches from it."""
    for _ in range(4):
        seeds, found = memory.start.seeds, hidden_sums(memory, branches_of(memory))
        if found.keys() <= seeds.keys():
            break
        memory = follow(memory.graph, replace(memory.start, seeds={**seeds, **found}))
    return memory


def _with_empty_streams(memory: Memory) -> Memory:
    """The memory from where its first value fills one of several streams, of which the others begin with constants."""
    graph, writes = memory.graph, memory.writes.keys() & memory.trunk
    shapes = {memory.shape}  # of the first value, also as it is viewed
    for number in sorted(n for n in memory.trunk if n < min(writes, default=0)):
        value, held = graph.values[number], memory.carried[number].count
        if value.numel == memory.count:
            shapes.add(value.shape)
        axes = [
            axis
            for axis, size in enumerate(value.shape)
            if 1 < size <= MOST_STREAMS
            and (*value.shape[:axis], *value.shape[axis + 1 :]) in shapes
            # All that it has of the memory lies at one place along the axis
            and (np.moveaxis(memory.carried[number].dense(), axis, 0) != NOTHING)
            .reshape(size, -1)
            .any(1)
            .sum()
            == 1
        ]
        if held != memory.count or not axes or memory.root.number in memory.back([memory.end], {number}):
            continue
        later = (graph.values[n] for n in sorted(memory.trunk) if n >= min(writes, default=0))
        if any(memory.carried[of.number].count < of.numel for of in later if of.shape == value.shape):
            return memory  # a history, of which each block fills one more place
        return follow(graph, start_with_streams(value, axes[0]))
    return memory


def _ranked(graph: Graph, roots: list[TracedValue]) -> list[Ranked]:
    found: list[Ranked] = []
    total = sum(graph.values[number].numel for number in graph.parameter_names)
    for root in roots:  # grows while it is gone through
        both = _of_root(graph, root)
        plain = both[0].memory
        is_state = any(of.memory.num_writes and of.memory.holds(root) for of in found)  # of another memory
        found.append(_larger(both))
        is_small = not is_state and max(_size(of.used) for of in both) < 0.6 * total
        if is_small and len(roots) < 2 * MOST_CANDIDATES:
            breaks = dict.fromkeys(value for of in both for value in _breaks(of.memory))
            roots += [value for value in breaks if value not in roots][:2]
        if plain.num_writes == 1:  # a long skip may lie around a norm with which the trunk begins
            normed = (
                v for read, v in plain.leaves if v.name in NORMS and not v.item and plain.is_whole(read)
            )
            roots += [of for of in normed if of not in roots][:2]
    for begin in folded_beginnings(graph):
        memory = follow(graph, start_with_streams(*begin))
        if memory.num_writes and has_feature_axis(memory):  # else the features were taken for streams
            found.append(Ranked(memory, _used(memory)))
    # No number a sequence, as a mean that is taken off the input and added to the output
    found = [of for of in found if of.memory.num_writes and max(of.memory.shape[1:], default=2) > 1]
    _with_shares(found, set[TracedValue]().union(*(of.used for of in found)))
    for of in found:
        root = of.memory.root
        earlier = [other.memory for other in found if other.memory.root is not root]
        known = [memory.count for memory in earlier if _is_spread(memory, root)]
        of.size = min([of.memory.count, *known])
    # What has no axis of features is no reading of branches that a memory with one has.
    with_axis = {id(of) for of in found if has_feature_axis(of.memory)}
    read = set[int]().union(*(of.memory.writes for of in found if id(of) in with_axis))
    found = [of for of in found if id(of) in with_axis or read.isdisjoint(of.memory.writes)]
    return sorted(found, key=lambda of: of.rank, reverse=True)


def _of_root(graph: Graph, root: TracedValue) -> list[Ranked]:
    """The memory that begins with a value, and that on which norms and activations lie, where such a one leads on."""
    plain = follow(graph, start_of(root))
    found = [Ranked(plain, _used(plain))]
    if _leads_on(plain):
        passing = follow(graph, replace(start_of(root), functions=True))
        found.append(Ranked(passing, _used(passing)))
    return found


def _larger(both: Sequence[Ranked]) -> Ranked:
    """The one without functions, unless more of the weights work on the other."""
    return both[_size(both[-1].used) > 1.05 * _size(both[0].used)]


def _is_spread(memory: Memory, value: TracedValue) -> bool:
    """Whether a value is a memory, nothing of which is missing, several times."""
    numbers = memory.carried.get(value.number)
    return numbers is not None and numbers.count == value.numel > memory.count <= numbers.distinct


def _with_shares(ranked: list[Ranked], everything: set[TracedValue]) -> list[Ranked]:
    for of in ranked:
        of.share = _size(of.used) / max(_size(everything), 1)
    return ranked


def _size(of: set[TracedValue]) -> int:
    return sum(weight.numel for weight in of)


def _leads_on(memory: Memory) -> bool:
    """Whether what a norm or an activation makes of a memory is moved, scaled or added anywhere."""
    graph = memory.graph
    normed = [of for read, of in memory.leaves if of.name in FUNCTIONS or centred(of, [read])]
    views = walk(normed, lambda of: (taker for taker in graph.takers(of) if taker.name in VIEWS))
    takers = (taker.name for of in views for taker in graph.takers(of))
    ends = LAYERS | VIEWS
    return any(name not in ends and not name.startswith("_scaled_dot_product") for name in takers)


def _breaks(memory: Memory) -> list[TracedValue]:
    """Where tokens were mixed, joined or added up, or channels padded, another memory may begin."""
    return [
        of for read, of in memory.leaves
        if (of.name in JOINS and of.numel >= memory.count)
        # Over one more axis than those of sequences, tokens and features, as over the codebooks of a sound.
        or (of.name in REDUCES and len(read.shape) > 3 and of.shape[-1:] == read.shape[-1:])
        or (of.name in SUMS and (of.numel >= memory.count or memory.carried[read.number].count < read.numel))
        # What makes features of a few channels is taken for a matrix of streams at first.
        or (of.name in MATRICES and not memory.num_writes and read.shape[-1] <= FEW_STREAMS)
    ]  # fmt: skip


def _used(memory: Memory) -> set[TracedValue]:
    """The weights that work between a memory's first and last value."""
    graph = memory.graph
    after, before = graph.later(memory.root), graph.earlier([memory.end])
    return {
        weight
        for number, of in weights(graph).items()
        if after[number] and before[number] and number != memory.root.number
        for weight in of
    }


def with_further_beginnings(memory: Memory) -> Memory:
    """The memory with further first values: added to it by several sums of the first connection, and never later."""
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
    if not found:
        return memory
    return follow(memory.graph, replace(memory.start, others=found))


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


def _scaled(value: TracedValue) -> Iterator[TracedValue]:
    """A value and what it is a copy of, a view, or a product with weights."""
    yield value
    while value.name in PASSES and (of := [p for p in value.parents if p.is_floating]):
        value = max(of, key=lambda parent: parent.numel)
        yield value


def _is_beginning(memory: Memory, value: TracedValue, until: int) -> bool:
    """Whether a value is like the first one, and needed for the first connection alone."""
    graph, root = memory.graph, memory.root
    if value.numel != root.numel or graph.depends(value, root):
        return False
    ways = walk([value], lambda of: (t for t in graph.takers(of) if t.name in PASSES and not memory.holds(t)))
    return all(taker.number <= until for way in ways for taker in graph.takers(way))


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
        return follow(memory.graph, start)
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
    parts = [part for part in (follow(memory.graph, of) for of in starts) if part.num_writes]
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
