"""Which values weigh a memory? All that multiplies what is carried, or what a branch gives before it is added."""

from __future__ import annotations

from depthscope.probes.reading.branches import branches_of
from depthscope.probes.reading.graph import PARAMETER, TracedValue
from depthscope.probes.reading.memory import Memory
from depthscope.probes.reading.operations import addends


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
