"""Which states does a forward carry through its depth, whatever hands them on? Found as values in its trace.

A state is what something computed from it is added to. Going back from the value that went through most of such sums, one
sum after another, gives the states of the longest chain: also where a loop outside of all modules adds the branches, where
blocks take and give several tensors, a dict or a list, or where something happens between two blocks.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from torch import nn

from depthscope.probes.dataflow.axes import same_axes, stream_atom
from depthscope.probes.dataflow.linear import WHOLE
from depthscope.probes.dataflow.operations import MOST_STREAMS
from depthscope.probes.dataflow.trace import Trace
from depthscope.probes.dataflow.values import Value, carrier_of
from depthscope.probes.model.modules import module_paths
from depthscope.probes.structure.chain import Chain, HookPoint
from depthscope.probes.structure.tape import Call, Tape

Place = tuple[Call, str, int]  # a call, the side, and which of the tensors there


@dataclass(frozen=True)
class CarriedState:
    """A state that was carried, and the places that showed it."""

    value: Value
    places: tuple[Place, ...]


class ShownValues:
    """Which calls of a tape took or returned a value, as it is or as another tensor of the same elements."""

    def __init__(self, tape: Tape):
        self._places: dict[int, list[Place]] = {}
        self._returned: dict[int, list[Call]] = {}
        for call in tape.calls:
            for at, item, value in call.shown():
                self._places.setdefault(unchanged_origin(value).number, []).append((call, at, item))
                if at == "output" and not item:
                    self._returned.setdefault(viewed_origin(value).number, []).append(call)

    def returned(self, value: Value) -> Call | None:
        """The outermost call whose first tensor was a value, in whatever shape."""
        found = self._returned.get(viewed_origin(value).number, ())
        return min(found, key=lambda call: call.level) if found else None

    def places(self, value: Value) -> tuple[Place, ...]:
        """Where a value was shown, in order."""
        return tuple(self._places.get(unchanged_origin(value).number, ()))


def unchanged_origin(value: Value) -> Value:
    """The value of which this one is a copy, an alias or a cast, with every axis in its place."""
    while value.step is not None and len(value.step.operands) == 1 and value.step.name in WHOLE:
        operand = value.step.operands[0]
        if operand.shape != value.shape or not same_axes(operand.axes, value.axes):
            return value
        value = operand
    return value


def viewed_origin(value: Value) -> Value:
    """The value of which this one has the same elements, in whatever shape and order."""
    while value.step is not None and len(value.step.operands) == 1 and value.step.name in WHOLE:
        value = value.step.operands[0]
    return value


def carried_values(trace: Trace, last: Value) -> list[list[Value]]:
    """The values that lead to one, in groups: each begins with a sum with something that was computed from the value before.

    Returns: The first group begins with what no such sum made. What follows in a group is the same state, scaled, moved
    or put together with others of its kind.
    """
    groups: list[list[Value]] = [[]]
    value = last
    while True:
        groups[-1].append(value)
        if value.step is None:
            return [group[::-1] for group in reversed(groups)]
        operands = value.step.operands
        carrier = carrier_of(value.step)
        if value.step.rule.sums and len(operands) > 1:
            # Others may be computed from the state before it was mixed, which is another value than the mixed one. What an
            # earlier state adds is no new state: it was not computed from the last one.
            own = [
                o
                for o in operands
                if o.merges == carrier.merges and all(p is o or trace.depends(p, o.root) for p in operands)
            ]
            if own:
                carrier = own[0]
                groups.append([])
        value = carrier


def shown_states(tape: Tape, last: Value, shown: ShownValues) -> list[CarriedState]:
    """Of every group of carried values the first one that some module took or returned; the last norm or activation of it.

    Where streams are mixed in plain code, no module may show a state: then the operation that made it does.
    """
    assert tape.trace is not None
    groups = [
        [CarriedState(value, shown.places(value)) for value in group]
        for group in carried_values(tape.trace, last)
    ]
    # After the last sum of a pre-norm model comes the final norm, which is no state of it.
    normed = any(_made_by_function(group) for group in groups[1:-1])
    begin = _beginning(groups[0])
    least = math.prod((groups[0][-1] if begin is None else begin).value.shape)
    if begin is not None and stream_atom(begin.value.axes, MOST_STREAMS) is not None:
        # Streams may be opened in every block anew, and merged at its end: then the smaller states are those handed on.
        begin, least = _shown_of(groups[0], normed=False), 0
    first = [begin, *(_shown_of(group, normed=normed, least=least) for group in groups[1:])]
    found = [state for state in first if state is not None]
    if not any(stream_atom(state.value.axes, MOST_STREAMS) is not None for state in found):
        return found
    return [state for group in groups if (state := _state_of_shape(group, found[-1].value.shape)) is not None]


def _beginning(group: Sequence[CarriedState]) -> CarriedState | None:
    """The state that the first branch is added to: the last one that a module shows, of that shape and order of axes.

    Before, it may have been an image with channels first, the text alone that an image is put next to, or without positions.
    """
    last = group[-1].value
    same = [s for s in group if s.value.shape == last.shape and same_axes(s.value.axes, last.axes)]
    return next((state for state in reversed(same) if state.places), None) or _shown_of(group, normed=False)


def _shown_of(group: Sequence[CarriedState], *, normed: bool, least: int = 0) -> CarriedState | None:
    # What was averaged or cut out of a state is smaller, and none of its depth; streams that are merged are as large as the
    # first state, and those that are put together larger than the sum.
    least = min(least, math.prod(group[0].value.shape))
    placed = [state for state in group if state.places and math.prod(state.value.shape) >= least]
    made = _made_by_function(group) if normed else []
    return made[-1] if made else placed[0] if placed else None


def _made_by_function(group: Sequence[CarriedState]) -> list[CarriedState]:
    """Those that are the norm or activation of a sum, as the states of post-norm blocks are."""
    sizes = group[0].value.shape
    placed = [state for state in group if state.places and state.value.shape == sizes]
    return [state for state in placed if (step := state.value.step) is not None and step.rule.function]


def _state_of_shape(group: Sequence[CarriedState], shape: tuple[int, ...]) -> CarriedState | None:
    """The state of a group that some module shows, or else the first one that has its axes."""
    fitting = [state for state in group if state.value.shape == shape]
    return next((state for state in fitting if state.places), fitting[0] if fitting else None)


def value_chains(tape: Tape, model: nn.Module) -> Iterator[tuple[Chain, list[Value]]]:
    """The chains of states that the forward carries, that of most sums first, with the values of their states.

    ``tape``: the calls of the first forward, with its trace.
    Yields: Of two states at least. Two chains have no sum in common.
    """
    trace = tape.trace
    if trace is None or trace.error is not None or trace.most_merged is None or tape.split:
        return
    shown = {value.number: value for call in tape.calls for _, _, value in call.shown() if value.merges > 1}
    shown[trace.most_merged.number] = trace.most_merged
    places = ShownValues(tape)
    seen: set[int] = set()
    for last in sorted(shown.values(), key=lambda value: (-value.merges, -value.number)):
        if last.root in seen:
            continue
        sums = {group[0].number for group in carried_values(trace, last)[1:]}
        if not sums & seen:
            states = shown_states(tape, last, places)
            if len(states) > 1:
                yield chain_of_states(tape, model, states), [state.value for state in states]
        seen |= sums


def chain_of_states(tape: Tape, model: nn.Module, states: Sequence[CarriedState]) -> Chain:
    """The chain of some states, labelled by the blocks in which what was added to each of them was computed.

    ``tape``: the calls of the first forward, with its trace.
    """
    assert tape.trace is not None
    branches = [_branch_calls(tape, states, number) for number in range(1, len(states))]
    layers = _layers(branches)
    modules = dict(module_paths(model))
    points = [_point(tape, states[0], -1, "embed", "(input)")]
    for number, (calls, layer) in enumerate(zip(branches, layers, strict=True)):
        inside = number + 1 < len(layers) and layers[number + 1] == layer
        producer = _producer(calls)
        points.append(_point(tape, states[number + 1], layer, "mid" if inside else "post", producer))
    blocks = tuple(dict.fromkeys(_block_path(_producer(calls)) for calls in branches))
    classes = dict.fromkeys(type(modules[path]).__name__ for path in blocks if path in modules)
    return Chain(
        name="",
        points=tuple(points),
        connections=(),
        blocks=blocks,
        block_class="/".join(classes),
        shapes=tuple(state.value.shape for state in states),
    )


def _branch_calls(tape: Tape, states: Sequence[CarriedState], number: int) -> list[Call]:
    """The calls in which a state was computed from those before it."""
    assert tape.trace is not None
    orders = Counter(tape.trace.calls_between(states[number].value, states[number - 1].value))
    return [tape.calls[order] for order, _ in orders.most_common() if order > 0]


def skips_blocks(tape: Tape, model: nn.Module, states: Sequence[Value]) -> bool:
    """Whether several blocks of one list ran between two of the states: they are no branch, and their states are missing."""
    modules = dict(module_paths(model))
    carried = [CarriedState(value, ()) for value in states]
    for number in range(1, len(states)):
        paths = {_block_path(call.path) for call in _branch_calls(tape, carried, number)}
        kinds = [
            (path.rpartition(".")[0], type(modules[path]))
            for path in paths
            if path in modules
            and path.rpartition(".")[2].isdigit()
            and any(True for _ in modules[path].children())
        ]
        if len(set(kinds)) < len(kinds):
            return True
    return False


def _layers(branches: Sequence[Sequence[Call]]) -> list[int]:
    """The number of the block that each branch belongs to.

    It is the first number in the module paths of most of its calls, where these ascend; else blocks are counted, one that
    runs several times as often as it runs.
    """
    blocks = [_block(calls) for calls in branches]
    numbers = [int(found[0]) if (found := re.search(r"\d+", path)) else -1 for path, _ in blocks]
    looped = len({path for path, _ in blocks}) < len(set(blocks))
    if numbers[0] >= 0 and not looped and all(b - a in (0, 1) for a, b in pairwise(numbers)):
        return numbers
    counted = [0]
    for before, block in pairwise(blocks):
        counted.append(counted[-1] + (block != before))
    return counted


def _block(calls: Sequence[Call]) -> tuple[str, int]:
    """Path and call index of the block that made most of a branch."""
    path = _block_path(_producer(calls))
    around = (other for call in calls for other in (call, *call.ancestors()) if other.path == path)
    return path, next((call.index for call in around), 0)


def _producer(calls: Sequence[Call]) -> str:
    """Path of the call that made most of a branch; of the block that most of its calls are in."""
    blocks = Counter(_block_path(call.path) for call in calls)
    most = max(blocks, key=lambda block: blocks[block], default="")
    return next((call.path for call in calls if _block_path(call.path) == most), "(no module)")


@lru_cache(maxsize=1 << 14)
def _block_path(path: str) -> str:
    """The part of a module path up to its first number."""
    found = re.match(r"(.*?\d+)(\.|$)", path)
    return found[1] if found else path


def _point(tape: Tape, state: CarriedState, layer: int, site: str, producer: str) -> HookPoint:
    if not state.places:
        place = tape.place_of(state.value)
        return HookPoint(
            place.module, place.call, "operation", layer, site, producer,
            item=place.order, operation=place.operation, result=place.result,
        )  # fmt: skip
    # Where it was returned, rather than taken: what takes a state may be a branch that does not run in every forward.
    call, at, item = next((place for place in state.places if place[1] == "output"), state.places[0])
    return HookPoint(call.path, call.index, at, layer, site, producer, call.method, item)
