"""Which values weigh a memory? All that multiplies what is carried, or what a branch gives before it is added."""

from __future__ import annotations

from collections.abc import Sequence

from depthscope.probes.reading.branches import branches_of
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
    branches, values = branches_of(memory), memory.graph.values
    ends = [
        *memory.ends,
        *(read for branch in branches for read in (branch.read, *branch.reads_before_norms)),
    ]
    carried = (values[number] for number in memory.back(ends))
    # Of each step what it carries or adds; all else that it takes is a weight.
    steps = [(of, addends(of)) for of in carried if memory.inside(of) and not memory.passes_function(of)]
    steps += [(values[number], [of]) for branch in branches for number, of in branch.steps.items()]
    taken = ((p, others) for step, others in steps for p in step.parents if not memory.holds(p))
    found = {p for p, others in taken if p.is_floating and p.kind != PARAMETER and p not in others}
    return sorted(found, key=lambda value: value.number)
