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

from depthscope.probes.dataflow.axes import same_axes
from depthscope.probes.dataflow.linear import WHOLE
from depthscope.probes.dataflow.trace import Trace, Value
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


def carried_values(trace: Trace, last: Value) -> list[Value]:
    """The sums that a value was carried through, first one first; before them, what the first one was added to.

    Parameters
    ----------
    trace : Trace
        Of the forward.
    last : Value
        Where to go back from.

    Returns
    -------
    list of Value
    """
    found: list[Value] = []
    value = last
    while value.step is not None and value.merges:
        operands = value.step.operands
        carrier = max(operands, key=lambda operand: (operand.merges, -operand.number))
        if value.step.rule.sums and len(operands) > 1:
            own = [o for o in operands if all(p is o or trace.depends(p, o) for p in operands)]
            if own:
                carrier = own[0]
                found.append(value)
        value = carrier
    found.append(value)
    return found[::-1]


def value_chain(tape: Tape, model: nn.Module, last: Value | None = None) -> Chain | None:
    """The chain of the states that the forward carries.

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
    Chain or None
        None where fewer than two states are shown by some module.
    """
    trace = tape.trace
    last = last or (None if trace is None else trace.most_merged)
    if trace is None or trace.error is not None or last is None:
        return None
    shown = ShownValues(tape)
    states = [CarriedState(value, shown.places(value)) for value in carried_values(trace, last)]
    states = [state for state in states if state.places]
    return _chain(tape, model, states) if len(states) > 1 else None


def _chain(tape: Tape, model: nn.Module, states: Sequence[CarriedState]) -> Chain:
    assert tape.trace is not None
    branches = [_branch_calls(tape, states, number) for number in range(1, len(states))]
    layers = _layers(branches)
    modules = dict(model.named_modules())
    points = [_point(states[0], -1, "embed", "(input)")]
    for number, (calls, layer) in enumerate(zip(branches, layers, strict=True)):
        inside = number + 1 < len(layers) and layers[number + 1] == layer
        producer = _producer(calls)
        points.append(_point(states[number + 1], layer, "mid" if inside else "post", producer))
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


def _point(state: CarriedState, layer: int, site: str, producer: str) -> HookPoint:
    # Where it was returned, rather than taken: what takes a state may be a branch that does not run in every forward.
    call, at, item = next((place for place in state.places if place[1] == "output"), state.places[0])
    return HookPoint(call.path, call.index, at, layer, site, producer, call.method, item)
