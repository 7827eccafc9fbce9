"""Stages: runs of blocks that form one chain, with a call such as downsampling between them that changes the shape."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence

from depthscope.probes.structure.tape import Call, Tape

# At most so many calls between two stages: a norm, a convolution, and the modules that wrap these. A heuristic of ours, from
# torchvision's and timm's models; more would join parts that only happen to follow one another.
BRIDGE = 4


def join_stages(tape: Tape, runs: Sequence[Sequence[Call]]) -> list[list[Call]]:
    """Join the runs of one class that a short bridge of other calls links.

    ``runs``: runs of linked calls of one class.
    Returns: Longer runs; between two stages stands the call that gives the next one its first state.
    """
    calls = _CallsByPath(tape)
    pieces = _with_single_blocks(tape, runs)
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
    constant = all(call.x_shape == call.y_shape for call in (before[-1], *after))
    return constant and before[-1].y_shape != after[0].x_shape


def _with_single_blocks(tape: Tape, runs: Sequence[Sequence[Call]]) -> list[list[Call]]:
    """The runs and, in order, the outermost calls of the same class that are in none, such as a stage of one block."""
    block_class = type(runs[0][0].module)
    taken = {id(call) for run in runs for call in run}
    single = [
        [call]
        for call in tape.calls
        if type(call.module) is block_class
        and id(call) not in taken
        and not any(type(ancestor.module) is block_class for ancestor in call.ancestors())
    ]
    return sorted([list(run) for run in runs] + single, key=lambda run: run[0].order)


class _CallsByPath:
    """The calls of a tape by module path, to follow tensors backwards."""

    def __init__(self, tape: Tape):
        self._at: dict[str, list[Call]] = defaultdict(list)
        for call in tape.calls:
            self._at[call.path].append(call)

    def producer(self, call: Call) -> Call | None:
        """The call whose output this one took: the last one of its producer's path before it."""
        same_path = self._at[call.producer] if call.producer else []
        position = bisect_left(same_path, call.order, key=lambda other: other.order)
        return same_path[position - 1] if position else None

    def bridge(self, last: Call, first: Call) -> Call | None:
        """The call that gives the next stage its input, where the output of the stage before leads to it; or None."""
        step = call = self.producer(first)
        for _ in range(BRIDGE):
            if call is None or call.order < last.order:
                return None
            before = self.producer(call)
            # A container around the last block ends after it with the same tensor, and counts as its producer.
            if before is last or (
                before is not None and last.inside(before) and before.y_shape == last.y_shape
            ):
                return step
            call = before
        return None
