"""Which values weigh a memory? All that multiplies what is carried, or what a branch gives before it is added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from depthscope.probes.reading.branches import Branch, branches_of
from depthscope.probes.reading.choice import memories
from depthscope.probes.reading.cuts import cuts_of
from depthscope.probes.reading.graph import PARAMETER, Graph, ReadingError, TracedValue
from depthscope.probes.reading.memory import Memory, without_inner
from depthscope.probes.reading.names import BranchNames, number_blocks
from depthscope.probes.reading.operations import addends


def memory_of(graph: Graph, values: Sequence[TracedValue]) -> Memory:
    """The memory that holds some values.

    Raises ReadingError: Where none holds them all.
    """
    for memory in memories(graph):
        branches = branches_of(memory)
        if not branches:
            continue
        names = BranchNames(memory, branches)
        number_blocks([names])
        inner = cuts_of(memory, branches, names.layers).inner
        found = without_inner(memory, inner) if inner else memory
        if all(found.holds(value) for value in values):
            return found
    raise ReadingError("no residual memory of the forward holds all of these states")


def coefficients(memory: Memory) -> list[TracedValue]:
    """The values that weigh a memory on the ways to its end and to what its branches read; parameters are not among them."""
    branches = branches_of(memory)
    ends = [memory.end, *(read for branch in branches for read in (branch.read, *branch.reads_before_norms))]
    found: dict[int, TracedValue] = {}
    for number in memory.back(ends):
        value = memory.graph.values[number]
        if memory.inside(value) and not memory.passes_function(value):
            found |= {factor.number: factor for factor in _factors(memory, value, addends(value))}
    for branch in branches:
        found |= {factor.number: factor for factor in _of_branch(memory, branch)}
    return [found[number] for number in sorted(found)]


def _of_branch(memory: Memory, branch: Branch) -> Iterator[TracedValue]:
    for number, before in branch.steps.items():
        yield from _factors(memory, memory.graph.values[number], [before])


def _factors(memory: Memory, value: TracedValue, others: Sequence[TracedValue]) -> Iterator[TracedValue]:
    for parent in value.parents:
        if (
            parent.is_floating
            and parent.kind != PARAMETER
            and not memory.holds(parent)
            and parent not in others
        ):
            yield parent
