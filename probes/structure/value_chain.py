"""Which states does a forward carry through its depth, whatever hands them on? Found as values in its trace.

A state is what something computed from it is added to. Going back from the value that went through most of such sums, one
sum after another, gives the states of the longest chain: also where a loop outside of all modules adds the branches, where
blocks take and give several tensors, a dict or a list, or where something happens between two blocks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from depthscope.probes.dataflow.axes import same_axes, stream_atom
from depthscope.probes.dataflow.linear import WHOLE
from depthscope.probes.dataflow.operations import MOST_STREAMS
from depthscope.probes.dataflow.trace import Trace, Value, carrier_of
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
        for call in tape.calls:
            for at, item, value in call.shown():
                self._places.setdefault(unchanged_origin(value).number, []).append((call, at, item))

    def places(self, value: Value) -> tuple[Place, ...]:
        """Where a value was shown, in order."""
        return tuple(self._places.get(unchanged_origin(value).number, ()))


def unchanged_origin(value: Value) -> Value:
    """The value of which this one is a copy, an alias or a cast, with every axis in its place."""
    while value.step is not None and len(value.step.operands) == 1 and value.step.func is not None:
        name, operand = str(value.step.func).split(".")[1].removesuffix("_"), value.step.operands[0]
        if name not in WHOLE or operand.shape != value.shape or not same_axes(operand.axes, value.axes):
            return value
        value = operand
    return value


def carried_values(trace: Trace, last: Value) -> list[list[Value]]:
    """The values that lead to one, in groups: each begins with a sum with something that was computed from the value before.

    Parameters
    ----------
    trace : Trace
        Of the forward.
    last : Value
        Where to go back from.

    Returns
    -------
    list of list of Value
        The first group begins with what no such sum made. What follows in a group is the same state, scaled, moved or put
        together with others of its kind.
    """
    groups: list[list[Value]] = [[]]
    value = last
    while True:
        groups[-1].append(value)
        if value.step is None:
            return [group[::-1] for group in reversed(groups)]
        operands = value.step.operands
        carrier = carrier_of(operands)
        if value.step.rule.sums and len(operands) > 1:
            # Others may be computed from the state before it was mixed, which is another value than the mixed one.
            own = [o for o in operands if all(p is o or trace.depends(p, o.root) for p in operands)]
            if own:
                carrier = own[0]
                groups.append([])
        value = carrier


def shown_states(tape: Tape, last: Value) -> list[CarriedState]:
    """Of every group of carried values the first one that some module took or returned.

    Where streams are mixed in plain code, no module may show a state: then the operation that made it does.
    """
    assert tape.trace is not None
    shown = ShownValues(tape)
    groups = [
        [CarriedState(value, shown.places(value)) for value in group]
        for group in carried_values(tape.trace, last)
    ]
    first = [next((state for state in group if state.places), None) for group in groups]
    found = [state for state in first if state is not None]
    if not found or stream_atom(found[-1].value.axes, MOST_STREAMS) is None:
        return found
    return [
        state
        for group in groups
        if (state := _state_of_shape(group, found[-1].value.shape, first=group is groups[0])) is not None
    ]


def _state_of_shape(group: Sequence[CarriedState], shape: tuple[int, ...], *, first: bool) -> CarriedState | None:
    fitting = [state for state in group if state.value.shape == shape]
    placed = [state for state in fitting if state.places]
    # What no module shows of the first group is how the streams were made.
    return placed[0] if placed else fitting[0] if fitting and not first else None


def value_chain(
    tape: Tape, model: nn.Module, last: Value | None = None
) -> tuple[Chain, list[Value]] | None:
    """The chain of the states that the forward carries, and their values.

    Parameters
    ----------
    tape : Tape
        The calls of the first forward, with its trace.
    model : Module
        The model.
    last : Value, optional
        The value to go back from; by default the one that went through most sums.

    Returns
    -------
    Chain and list of Value, or None
        None where fewer than two states are shown by some module.
    """
    trace = tape.trace
    last = last or (None if trace is None else trace.most_merged)
    if trace is None or trace.error is not None or last is None:
        return None
    states = shown_states(tape, last)
    if len(states) < 2:
        return None
    return _chain(tape, model, states), [state.value for state in states]


def _chain(tape: Tape, model: nn.Module, states: Sequence[CarriedState]) -> Chain:
    assert tape.trace is not None
    branches = [_branch_calls(tape, states, number) for number in range(1, len(states))]
    layers = _layers(branches)
    modules = dict(model.named_modules())
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
    stops = frozenset(state.value.number for state in states[:number])
    orders = Counter(tape.trace.calls_between(states[number].value, stops))
    earlier = max(stops)
    begun = tape.trace.calls[earlier]
    return [tape.calls[order] for order, _ in orders.most_common() if order > max(begun, 0)]


def _layers(branches: Sequence[Sequence[Call]]) -> list[int]:
    """The number of the block that each branch belongs to: the first number in the paths of most of its calls."""
    numbers: list[int] = []
    for calls in branches:
        found = Counter(int(number[0]) for call in calls if (number := re.search(r"\d+", call.path)))
        numbers.append(found.most_common(1)[0][0] if found else -1)
    ascending = all(b - a in (0, 1) for a, b in zip(numbers, numbers[1:], strict=False))
    return numbers if numbers[0] >= 0 and ascending else list(range(len(numbers)))


def _producer(calls: Sequence[Call]) -> str:
    """Path of the call that made most of a branch."""
    return calls[0].path if calls else "(no module)"


def _block_path(path: str) -> str:
    """The part of a module path up to its first number."""
    found = re.match(r"(.*?\d+)(\.|$)", path)
    return found[1] if found else path


def _point(tape: Tape, state: CarriedState, layer: int, site: str, producer: str) -> HookPoint:
    if not state.places:
        call = tape.calls[state.value.call]
        return HookPoint(
            call.path, call.index, "operation", layer, site, producer, call.method, state.value.ordinal
        )
    # Where it was returned, rather than taken: what takes a state may be a branch that does not run in every forward.
    call, at, item = next((place for place in state.places if place[1] == "output"), state.places[0])
    return HookPoint(call.path, call.index, at, layer, site, producer, call.method, item)
