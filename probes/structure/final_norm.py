"""Which call gives the norm of the last state of a memory? By what was computed from it, whatever the module is called."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from depthscope.probes.reading.description import MemoryReading
from depthscope.probes.reading.graph import Graph, Shown, TracedValue
from depthscope.probes.reading.memory import Memory, follow, start_of
from depthscope.probes.reading.operations import FUNCTIONS, NORMS
from depthscope.probes.structure.chain import NO_FINAL_NORM


def final_norm(graph: Graph, memory: MemoryReading, shape: tuple[int, ...]) -> tuple[Shown | None, str]:
    """Where a call gives the norm of the last state, or of what its streams are merged to; or None, and why none does.

    ``shape``: of the last state, as it is captured.
    """
    end = memory.states[-1].values[-1]
    why, several = NO_FINAL_NORM, memory.num_streams > 1
    for merged in _merged(graph, memory, end):
        after = follow(graph, replace(start_of(merged), functions=True))
        normed = [graph.values[n] for n in _normed(after)]
        places = [(shown, value) for value in normed for shown in graph.shown.get(value.number, ())]
        given = [
            (shown, value)
            for shown, value in places
            if shown.at == "output"
            and shown.call
            and after.is_whole(value)
            and (several or value.shape == shape)
        ]
        if given:
            return min(given, key=lambda of: of[0].order)[0], ""
        if normed:
            path = graph.path(normed[0])
            why = (
                f"a norm takes the last state before the end of {path or 'the model'}, and no module returns what it gives "
                "for every token"
            )
    return None, why


def _merged(graph: Graph, memory: MemoryReading, end: int) -> Iterator[TracedValue]:
    """The last state, or what its streams are merged to."""
    if memory.num_streams == 1:
        yield graph.values[end]
        return
    one = math.prod(memory.shape)
    for number, numbers in memory.carried.items():
        if number > end and numbers.count == numbers.distinct == one:
            yield graph.values[number]


def _normed(after: Memory) -> list[int]:
    """The values that a norm lies before, and to which nothing was added."""
    found: set[int] = set()
    for number in sorted(after.carried):
        value = after.graph.values[number]
        inside = after.inside(value)
        if after.depth[number] == 0 and (_is_norm(after, value) or any(p.number in found for p in inside)):
            found.add(number)
    return sorted(found)


def _is_norm(memory: Memory, value: TracedValue) -> bool:
    return memory.passes_function(value) and (value.name in NORMS or value.name not in FUNCTIONS)
