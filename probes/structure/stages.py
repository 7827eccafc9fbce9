"""How do the stages of one trunk become one chain? With what blocks take and give in other shapes, and its last norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from depthscope.probes.model.layout import LayoutError
from depthscope.probes.reading.description import MemoryReading
from depthscope.probes.reading.graph import Graph, TracedValue
from depthscope.probes.reading.memory import Memory, follow, start_of
from depthscope.probes.reading.operations import FUNCTIONS, NORMS
from depthscope.probes.structure.chain import NO_FINAL_NORM, Chain, Connection, HookPoint
from depthscope.probes.structure.read_layout import SequenceAxis, shape_layout


def trunks_of(graph: Graph, memories: Sequence[MemoryReading]) -> list[list[MemoryReading]]:
    """Memories of blocks of one class, of which each is computed from those before alone, as one trunk."""
    trunks: list[list[MemoryReading]] = []
    for memory in sorted(memories, key=lambda memory: memory.root):
        before = next((trunk for trunk in trunks if _is_next_stage(graph, trunk, memory)), None)
        if before is None:
            trunks.append([memory])
        else:
            before.append(memory)
    return sorted(trunks, key=lambda trunk: memories[0] not in trunk)


def _is_next_stage(graph: Graph, trunk: Sequence[MemoryReading], after: MemoryReading) -> bool:
    """Whether a memory is the next stage of a trunk: in its container, or of its class of blocks and another shape."""
    before, root = trunk[-1], graph.values[after.root]
    if root.number <= before.end or not graph.depends(root, graph.values[before.end]):
        return False
    kinds = [{graph.calls[unit].kind for unit in memory.units} for memory in (before, after)]
    is_like = before.shape != after.shape and not kinds[0].isdisjoint(kinds[1])
    if not is_like and before.name != after.name:
        return False
    known = set().union(*(memory.carried for memory in trunk))  # what else comes in is of another tower
    way = graph.earlier([root], known)
    return not any(way[v.number] and graph.depends_on_input(v) for v in graph.values if not v.parents)


def _stage_of(path: str) -> str | None:
    """What holds a module whose name ends with a number, as of blocks that are no list's (`stage.block2`); None for others."""
    container, _, name = path.rpartition(".")
    return container if name[-1:].isdigit() else None


def with_opening(graph: Graph, chain: Chain, sequences: SequenceAxis) -> Chain:
    """The chain with what its first blocks take, where these make the first state in another shape."""
    containers = {_stage_of(path) for path in chain.blocks} - {None}
    kinds = {_content(graph, path) for path in chain.blocks}
    state, limit = graph.values[chain.points[0].number], len(graph.calls)
    while True:
        given = [shown.call for shown in graph.shown.get(state.number, ()) if shown.at == "output"]
        # The call of a block, before the last one, in which the state was made, or which gives it.
        around = (call for call in (*graph.stack(state), *given) if call < limit)
        call = next((n for n in around if _stage_of(graph.calls[n].path) in containers), None)
        if call is None:
            break
        limit = call
        block = graph.calls[call]
        taken = graph.shown_at(block.path, block.number, "input", 0)
        if taken is None or taken is state or _content(graph, block.path) not in kinds:
            break
        if taken.shape == state.shape or not _has_layout(taken, chain.layout, sequences):
            break
        begin, layer = chain.points[0], chain.points[1].layer - 1
        if call not in given or begin.site != "embed" or layer < 0:
            break
        begin = replace(begin, layer=layer, site="post", module=block.path)
        opening = HookPoint(
            block.path, block.number, "input", -1, "embed", "(input)", taken.number, taken.shape
        )
        chain = replace(
            chain,
            points=(opening, begin, *chain.points[1:]),
            connections=tuple(_moved(c, 1, 0) for c in chain.connections),
            blocks=(opening.path, *chain.blocks),
        )
        state = taken
    return chain


def _content(graph: Graph, path: str) -> tuple[str, ...]:
    """The class of a block, and of a Sequential, which any may be, those of its layers."""
    kind = graph.modules.get(path, "")
    if kind != "Sequential":  # of any other, not all modules are gone through
        return (kind,)
    return kind, *(of for name, of in graph.modules.items() if name.rpartition(".")[0] == path)


def _moved(connection: Connection, depths: int, layers: int) -> Connection:
    depth_in, depth_out = connection.depth_in + depths, connection.depth_out + depths
    return replace(connection, depth_in=depth_in, depth_out=depth_out, layer=connection.layer + layers)


def _has_layout(taken: TracedValue, layout: str, sequences: SequenceAxis) -> bool:
    try:
        return sequences.graph.depends_on_input(taken) and shape_layout(taken, sequences) == layout
    except LayoutError:
        return False


def with_next_stage(chain: Chain, stage: Chain) -> Chain:
    """A chain with the states of its next stage, whose blocks are numbered after those before."""
    offset, last = len(chain.points), max(point.layer for point in chain.points)
    begin, *later = stage.points
    number = min((point.layer for point in stage.points if point.layer >= 0), default=0)
    # What its first block reads is the embedding
    number -= begin.site == "embed" and bool(later) and later[0].site == "pre"
    shift, before = last + 1 - number, chain.points
    if stage.points[0].module == before[-1].module:  # a block in which one ends and the other begins
        shift, before = last - number, (*before[:-1], replace(before[-1], site="mid"))
    proof = chain.proof if stage.proof == "proven" else stage.proof
    if chain.shapes[-1] == stage.shapes[0] and proof == "proven":
        proof = f"unproven: from depth {offset - 1} to {offset} the state is not carried on"
    moved = (_moved(c, offset, shift) for c in stage.connections)
    kinds = dict.fromkeys([*chain.block_class.split("/"), *stage.block_class.split("/")])
    first, places = stage.points[0].module, {_stage_of(path) for path in stage.blocks} - {None}
    first_blocks = [first] if stage.points[0].site == "post" and _stage_of(first) in places else []
    return replace(
        chain,
        points=(*before, *(_point_of_stage(point, number, shift) for point in stage.points)),
        connections=(*chain.connections, *moved) if chain.connections and stage.connections else (),
        blocks=tuple(dict.fromkeys([*chain.blocks, *first_blocks, *stage.blocks])),
        block_class="/".join(kinds),
        proof=proof,
        memories=(*chain.memories, *stage.memories),
    )


def _point_of_stage(point: HookPoint, first: int, shift: int) -> HookPoint:
    """A state of a later stage, whose blocks begin with a number, in the whole chain."""
    if point.site != "embed":
        return replace(point, layer=point.layer + shift)
    if point.at == "input":  # what the first block takes
        return replace(point, layer=first + shift, site="pre", module=point.path)
    return replace(point, layer=first + shift)


def with_final(graph: Graph, chain: Chain) -> Chain:
    """The chain with the call that gives the norm of its last state, or of its merged streams, or why none does."""
    memory, why = chain.memories[-1], NO_FINAL_NORM
    one, several = math.prod(memory.shape), memory.num_streams > 1
    merged = [n for n, of in memory.carried.items() if n > memory.end and of.count == of.distinct == one]
    for number in merged if several else [memory.end]:
        after = follow(graph, replace(start_of(graph.values[number]), functions=True))
        normed = [graph.values[n] for n in _norms_of(after)]
        given = [
            (shown, value)
            for value in normed
            for shown in graph.shown.get(value.number, ())
            if shown.at == "output" and shown.call and after.is_whole(value)
            if several or value.shape == chain.shapes[-1]
        ]
        if given:
            shown, value = min(given, key=lambda of: of[0].order)
            path, index = graph.calls[shown.call].path, graph.calls[shown.call].number
            layer = chain.points[-1].layer
            point = HookPoint(
                path, index, "output", layer, "final", path, value.number, value.shape, item=shown.item
            )
            return replace(chain, final=point)
        if normed:
            path = graph.path(normed[0])
            why = (
                f"the last state is normalised in {path or 'the model'}, and no module returns the result for every token in "
                "the state's shape"
            )
    return replace(chain, without_final=why)


def _norms_of(after: Memory) -> list[int]:
    """The values that a norm lies before, and to which nothing was added."""
    found: set[int] = set()
    for number in sorted(after.carried):
        value = after.graph.values[number]
        inside = after.inside(value)
        is_norm = after.passes_function(value) and (value.name in NORMS or value.name not in FUNCTIONS)
        if after.depth[number] == 0 and (is_norm or any(p.number in found for p in inside)):
            found.add(number)
    return sorted(found)
