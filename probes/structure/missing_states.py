"""Does every block like those that are read take and give a state? Otherwise the chain is not complete."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from depthscope.probes.reading.description import MemoryReading
from depthscope.probes.reading.graph import Graph, TracedValue, walk
from depthscope.probes.reading.operations import NORMS, moved
from depthscope.probes.structure.chain import Chain, HookPoint
from depthscope.probes.structure.tape import value_at


def missing_state(graph: Graph, chains: Sequence[Chain], memories: Sequence[MemoryReading]) -> str:
    """A block, next to those of plain chains and of their class, that takes or gives no state of them; empty where none is.

    What lies inside of a branch is none, and nothing is missed of what is called for nothing.
    """
    if (twice := _named_twice(graph, chains)) is not None:
        return f"{twice.module}, which is not a module, gives a second state after block {twice.layer}"
    known = {number for memory in memories for state in memory.states for number in state.values}
    known |= {value.number for chain in chains for p in chain.points if (value := value_at(graph, p))}
    # What has the elements of a state in another order is one.
    known = {of.number for of in walk((graph.values[n] for n in known), partial(moved, graph))}
    branches = [branch for m in memories for c in m.connections for branch in c.branches]
    known |= {number for branch in branches for number in branch.way}
    # What a branch reads in the middle of a step, as of a solver's second evaluation, is proven next to the states.
    reads = {value for branch in branches for place in branch.reads if (value := graph.at(place)) is not None}
    carried = {number for memory in memories for number in memory.carried}
    missing = {read.number for read in reads if _is_between_states(graph, read, known, carried)}
    known |= {read.number for read in reads} - missing
    # What a branch reads of a state may be carried too, as by a norm in single operations.
    sources = {branch.way[0] for branch in branches}  # which may be a part of the memory by themselves
    inside = graph.earlier([graph.values[number] for number in sources], (known | missing) - sources)
    works = {
        f"{path}." for b in branches for path in (b.path, graph.calls[b.unit].path if b.unit >= 0 else b.path)
    }
    # A layer before the first branch, or between stages, is no block.
    blocks = {
        path
        for chain in chains
        for path in chain.blocks
        if path[-1:].isdigit() and any(work.startswith(f"{path}.") for work in works)
    }
    like = {(path.rpartition(".")[0], graph.modules.get(path)) for path in blocks}
    sides = sorted(graph.sides.items())
    # Of several values that a block gives, those in whose place blocks that are read give a state or what is added to it.
    items = {
        n
        for (call, _), of in sides
        if graph.calls[call].path in blocks
        for n, v in enumerate(of)
        if v.number in known
    }
    for (call, at), values in sides:
        path = graph.calls[call].path
        values = [value for n, value in enumerate(values) if n in items or len(values) == 1]
        is_like = path[-1:].isdigit() and (path.rpartition(".")[0], graph.modules.get(path)) in like
        counts = not any(inside[v.number] for v in values) and any(map(graph.reaches_output, values))
        if is_like and counts and not any(v.number in known for v in values):
            return f"{path} {'takes' if at == 'input' else 'gives'} no state of the chain"
    return ""


def _named_twice(graph: Graph, chains: Sequence[Chain]) -> HookPoint | None:
    """A state that no module gives, and that is called the state after a block which has one already."""
    for chain in chains:
        ends = [point for point in chain.points if point.site == "post"]
        for before, point in pairwise(ends):
            if point.layer == before.layer and point.module not in graph.modules:
                return point
    return None


def _is_between_states(graph: Graph, read: TracedValue, states: set[int], carried: set[int]) -> bool:
    """Whether a read is no state, and should be one: a norm between blocks makes it of a state, and the next is made of it."""
    if read.number in states:
        return False
    made_of = walk(
        [read], lambda value: (p for p in value.parents if p.number in carried and p.number not in states)
    )
    if not any(value.name in NORMS for value in made_of):
        return False
    later = walk([read], lambda value: (of for of in graph.takers(value) if of.number in carried))
    return any(value.number in states for value in later)
