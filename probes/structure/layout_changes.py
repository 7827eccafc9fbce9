"""Does the order of a state's axes change along a chain? Then each part of one order is a chain of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from depthscope.probes.dataflow.axes import layout_of
from depthscope.probes.dataflow.values import Value
from depthscope.probes.model.layout import parse_layout
from depthscope.probes.structure.chain import Chain
from depthscope.probes.structure.plain_proof import states_of
from depthscope.probes.structure.tape import Tape


def split_at_layout_changes(tape: Tape, chain: Chain) -> list[Chain]:
    """The parts of a plain chain in which the axes of the states have one order, as image first and sequence of tokens later.

    ``tape``: the calls of the first forward, with its trace.
    Returns: The chain itself where the order of its axes does not change, or is not known to.
    """
    if chain.has_streams or chain.history:
        return [chain]
    starts = [0]
    known = ""  # the order since the last start, where it shows
    for depth, state in enumerate(states_of(tape, chain.points)):
        order = _order(state)
        if len(chain.shapes[depth]) != len(chain.shapes[starts[-1]]) or (known and order and order != known):
            starts.append(depth)
            known = order
        known = known or order
    if len(starts) == 1:
        return [chain]
    ends = [*starts[1:], len(chain.points)]
    prefix = f"{chain.name}_" if chain.name else ""
    return [
        _part(chain, f"{prefix}part{number}", start, end)
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def _order(state: Value | None) -> str:
    """Where the sequences and the features are among a state's axes; empty where that does not show."""
    layout = None if state is None else layout_of(state.axes, None)
    if layout is None:
        return ""
    return " ".join("B" if "B" in axis else "D" if "D" in axis else "T" for axis in parse_layout(layout))


def _part(chain: Chain, name: str, start: int, end: int) -> Chain:
    points = chain.points[start:end]
    connections = tuple(
        replace(connection, depth_in=connection.depth_in - start, depth_out=connection.depth_out - start)
        for connection in chain.connections
        if connection.depth_in >= start and connection.depth_out < end
    )
    return replace(
        chain,
        name=name,
        points=points,
        shapes=chain.shapes[start:end],
        connections=connections,
        blocks=_blocks_of(chain.blocks, [point.module for point in points]) or chain.blocks,
        final=chain.final if end == len(chain.points) else None,
    )


def _blocks_of(blocks: Sequence[str], modules: Sequence[str]) -> tuple[str, ...]:
    """The blocks that some of the modules are, or are in."""
    return tuple(block for block in blocks if any(m == block or m.startswith(f"{block}.") for m in modules))
