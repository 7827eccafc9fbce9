"""Are streams expanded and merged inside each block? Then states of one stream are handed on, whatever happens in between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from depthscope.probes.dataflow.axes import stream_atom
from depthscope.probes.dataflow.linear import LinearDependence
from depthscope.probes.dataflow.operations import MOST_STREAMS
from depthscope.probes.dataflow.trace import Value


def inner_streams(states: Sequence[Value | None]) -> int:
    """The number of streams that every step of a chain makes of its state, and merges again.

    ``states``: the states of a chain in the trace of a forward.
    Returns: 0 where some step makes none, or not as many as the others.
    """
    counts = set()
    for before, after in pairwise(states):
        if before is None or after is None or stream_atom(before.axes, MOST_STREAMS) is not None:
            return 0
        counts.add(_copies(before, after))
    return counts.pop() if len(counts) == 1 else 0


def _copies(before: Value, after: Value) -> int:
    """How many copies of a state its next state is a sum of; 0 where none are made."""
    size = math.prod(before.shape)
    for value in LinearDependence(after, [before]).carrying:
        stream = stream_atom(value.axes, MOST_STREAMS)
        expanded = stream is not None and stream.size > 1 and math.prod(value.shape) == stream.size * size
        # Copies of this state alone: a stack of several streams that are handed on one by one has the others as sources.
        if expanded and not LinearDependence(value, [before]).sources:
            assert stream is not None
            return stream.size
    return 0
