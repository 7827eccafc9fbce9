"""Does a chain of values carry several streams, which no known connection mixes and writes? By its trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from depthscope.probes.connections.families.traced import TracedConnection, find_traced
from depthscope.probes.connections.family import Site, StreamConnectionError
from depthscope.probes.dataflow.axes import layout_of, stream_atom
from depthscope.probes.dataflow.operations import MOST_STREAMS
from depthscope.probes.dataflow.values import Value
from depthscope.probes.structure.chain import Chain, Connection
from depthscope.probes.structure.stream_chain import branch_label
from depthscope.probes.structure.tape import Call, Tape
from depthscope.probes.structure.value_chain import ShownValues

STYLE = "traced"


@dataclass(frozen=True)
class TracedStreams:
    """A chain with streams, and what its connections are."""

    chain: Chain
    sites: Mapping[int, Site]


def traced_streams(tape: Tape, chain: Chain, states: Sequence[Value]) -> TracedStreams | None:
    """A chain of values as one with streams.

    ``tape``: the calls of the first forward, with its trace.
    Returns: None where its states have no axis of streams.
    Raises StreamConnectionError: Where they have one, and some connection cannot be read.
    """
    # The states of a chain have one layout; the proof would not hold in another one.
    layouts = {found for state in states if (found := _layout(state)) is not None}
    if len(layouts) != 1 or len({state.shape for state in states}) > 1:
        return None
    ((layout, count),) = layouts
    shown = ShownValues(tape)
    connections, sites = [], {}
    for depth, (before, after) in enumerate(pairwise(states)):
        connection = traced_connection(tape, before, after, count)
        if connection.branch_in is None:
            raise StreamConnectionError(
                f"from depth {depth} to {depth + 1}: no module shows what the branch takes from the streams"
            )
        connections.append(_connection(chain, depth, shown.returned(connection.branch_out)))
        sites[depth] = Site(STYLE, "hc", count, layout)
    return TracedStreams(replace(chain, connections=tuple(connections), proof=""), sites)


def _layout(state: Value) -> tuple[str, int] | None:
    stream = stream_atom(state.axes, MOST_STREAMS)
    layout = None if stream is None else layout_of(state.axes, stream)
    return None if stream is None or layout is None else (layout, stream.size)


def traced_connection(tape: Tape, before: Value, after: Value, num_streams: int) -> TracedConnection:
    """The values around the connection between two states, as `find_traced` finds them."""
    assert tape.trace is not None
    shown = {value.number: value for call in tape.calls for _, _, value in call.shown()}
    return find_traced(tape.trace, before, after, shown, num_streams)


def _connection(chain: Chain, depth: int, branch: Call | None) -> Connection:
    point = chain.points[depth + 1]
    path = branch.path if branch is not None else point.module
    return Connection(
        path=path,
        index=depth,
        layer=point.layer,
        branch=branch_label(path.rpartition(".")[2], type(branch.module).__name__ if branch else "", path),
        branch_path=None if branch is None else branch.path,
        branch_index=0 if branch is None else branch.index,
        style=STYLE,
        depth_in=depth,
        depth_out=depth + 1,
    )
