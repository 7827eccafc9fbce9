"""Does a block hand on its last branch next to its state, instead of adding it? Then its state is the one before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from depthscope.probes.dataflow.linear import LinearDependence
from depthscope.probes.dataflow.trace import Trace
from depthscope.probes.dataflow.values import Value
from depthscope.probes.structure.chain import Chain
from depthscope.probes.structure.plain_proof import states_of
from depthscope.probes.structure.tape import Tape


def with_deferred_branches(tape: Tape, chain: Chain) -> Chain:
    """A chain whose states before a deferred branch are called ``mid``, as they are where the branch is added at once.

    ``tape``: the calls of the first forward, with its trace.
    """
    trace = tape.trace
    given = _given_together(tape)
    if trace is None or trace.error is not None or not given or chain.has_streams or chain.history:
        return chain
    states = states_of(tape, chain.points)
    deferred = [
        depth
        for depth, (state, after) in enumerate(pairwise(states))
        if state is not None and after is not None and _is_completed(trace, state, after, given)
    ]
    # The last block is like those before it; no later state tells.
    last = len(states) - 1
    if deferred and deferred[-1] == last - 1 and chain.points[last].site == "post":
        deferred.append(last)
    points = list(chain.points)
    for depth in deferred:
        if points[depth].site == "post":
            points[depth] = replace(points[depth], site="mid")
    return replace(chain, points=tuple(points))


def _given_together(tape: Tape) -> Mapping[int, Sequence[Value]]:
    """By the number of a value that a call gave, the others of its shape that the same call gave."""
    found: dict[int, list[Value]] = {}
    for call in tape.calls:
        values = [passed.value for passed in call.outputs if passed.value is not None]
        for value in values:
            others = [other for other in values if other is not value and other.shape == value.shape]
            if others:
                found.setdefault(value.number, []).extend(others)
    return found


def _is_completed(trace: Trace, state: Value, after: Value, given: Mapping[int, Sequence[Value]]) -> bool:
    """Whether the next state is the sum of a state and of what was computed from it and handed on with it."""
    for branch in given.get(state.number, ()):
        if trace.depends(branch, state) and len(LinearDependence(after, [state, branch]).reached) == 2:
            return True
    return False
