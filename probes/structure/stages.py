"""Stages: runs of one class become one chain where a call between them, such as downsampling, changes the state's shape."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence

from depthscope.probes.structure.tape import Call, Tape

BRIDGE = 4  # at most so many calls lie between two stages: a norm, a convolution, and what wraps them


def join_stages(tape: Tape, runs: Sequence[Sequence[Call]]) -> list[list[Call]]:
    """Join the runs of one class that a short bridge of other calls links.

    Parameters
    ----------
    tape : Tape
        The calls.
    runs : sequence of sequence of Call
        Runs of linked calls of one class.

    Returns
    -------
    list of list of Call
        Longer runs; between two stages stands the call that gives the next one its first state.
    """
    calls = _Calls(tape)
    pieces = _with_lone_blocks(tape, runs)
    chains = [pieces[0]]
    for piece in pieces[1:]:
        step = calls.bridge(chains[-1][-1], piece[0]) if _are_stages(chains[-1], piece) else None
        if step is None:
            chains.append(piece)
        else:
            chains[-1] += [step, *piece]
    return [chain for chain in chains if len(chain) > 1]


def _are_stages(before: Sequence[Call], after: Sequence[Call]) -> bool:
    """Whether the shape changes between two runs and nowhere in them."""
    even = all(call.x_shape == call.y_shape for call in (before[-1], *after))
    return even and before[-1].y_shape != after[0].x_shape


def _with_lone_blocks(tape: Tape, runs: Sequence[Sequence[Call]]) -> list[list[Call]]:
    """The runs and, in order, the calls of the same class that stand alone, such as a stage of one block."""
    kind = type(runs[0][0].module)
    taken = {id(call) for run in runs for call in run}
    lone = [
        [call]
        for call in tape.calls
        if type(call.module) is kind and id(call) not in taken and not _within(call, kind)
    ]
    return sorted([list(run) for run in runs] + lone, key=lambda run: run[0].order)


def _within(call: Call, kind: type) -> bool:
    parent = call.parent
    while parent is not None and type(parent.module) is not kind:
        parent = parent.parent
    return parent is not None


class _Calls:
    """The calls of a tape by path, to follow tensors backwards."""

    def __init__(self, tape: Tape):
        self._at: dict[str, list[Call]] = defaultdict(list)
        for call in tape.calls:
            self._at[call.path].append(call)

    def producer(self, call: Call) -> Call | None:
        """The call whose output this one took."""
        same = self._at[call.producer] if call.producer else []
        position = bisect_left(same, call.order, key=lambda other: other.order)
        return same[position - 1] if position else None

    def bridge(self, last: Call, first: Call) -> Call | None:
        """The call that gives the next stage its input, where the output of the stage before leads to it; or None."""
        step = call = self.producer(first)
        for _ in range(BRIDGE):
            if call is None or call.order < last.order:
                return None
            before = self.producer(call)
            if before is last or (
                before is not None and last.inside(before) and before.y_shape == last.y_shape
            ):
                return step
            call = before
        return None
