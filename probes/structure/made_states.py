"""What a block gave as the first state of a later stage, before that was changed and the next block took it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from depthscope.probes.reading.graph import Graph, TracedValue
from depthscope.probes.structure.chain import Chain, HookPoint
from depthscope.probes.structure.read_chains import ReadChain


def with_made_state(graph: Graph, part: ReadChain, layout_of: Callable[[TracedValue], str]) -> Chain:
    """The chain of a stage with what a block gave as its first state, where that was changed outside of blocks.

    As where positions are added to what a block that makes fewer tokens gave.
    """
    chain, memory = part.chain, part.memory
    first, begin = max(memory.states[0].values), chain.points[0]
    if begin.site != "post" or begin.layer < 0:
        return chain
    for number in sorted(n for n in memory.carried if n < first):
        value = graph.values[number]
        calls = [graph.calls[shown.call] for shown in graph.shown.get(number, ()) if shown.at == "output"]
        around = graph.values[first].call  # where the block was called, it was changed
        blocks = [c for c in calls if c.path.rpartition(".")[2].isdigit() and c.parent == around]
        if not blocks or value.shape != graph.values[first].shape or layout_of(value) != part.layout:
            continue
        block = min(blocks, key=lambda call: len(call.path))
        made = HookPoint(block.path, block.number, "output", begin.layer, "post", block.path)
        taker = begin.path if begin.at == "input" else begin.module
        begin = replace(begin, layer=chain.points[1].layer, site="pre", module=taker)
        return chain.preceded_by(made, begin, value.shape)
    return chain
