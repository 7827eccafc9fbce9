"""Which held tensors can no memory need any more? Those of values that ended inside of a call, and that nothing was added to.

What a product or a sum takes is held, since it may be what a branch writes, or a coefficient. Most of it is neither: the
inside of an activation, of a gated feed-forward layer, of a norm. When a call has ended, and of all that was made of such a
value by operations that may carry a memory no tensor is left, then whatever was computed from it went through a layer, and no
state has it as a part. It is let go, unless these values are a memory of their own: one of them was computed by layers from
another one, as a branch computes what it adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from depthscope.probes.reading.graph import INPUT, PARAMETER, TracedValue, walk
from depthscope.probes.reading.known_operations import CARRYING, KnownOperation, is_layer, operation_of
from depthscope.probes.reading.operations import FUNCTIONS, MIXES, MOST_STREAMS

# What these take may go on in what they give, or that is made again from it.
PASSED_ON = CARRYING | FUNCTIONS | MIXES
FEWEST_BYTES = 2**16  # smaller tensors weigh less than what is noted of them


def can_end(value: TracedValue, tensor: torch.Tensor) -> bool:
    """Whether a tensor that is held is worth while letting go: a large one that an operation made."""
    return value.func is not None and tensor.numel() * tensor.element_size() >= FEWEST_BYTES


def ended(
    held: Sequence[TracedValue], made: Sequence[TracedValue], is_alive: Callable[[TracedValue], bool]
) -> list[TracedValue]:
    """Of some values those that no memory can need.

    ``made``: all values that were made in a call that has ended, in order; ``is_alive``: whether anything but the recorder
    has a tensor of one.
    """
    first = made[0].number
    carried = [_carried(of) for of in made]
    groups = _joined(carried, first)
    # What carries on a value from before the call may be a state.
    alive = {
        group
        for of, group, parents in zip(made, groups, carried, strict=True)
        if is_alive(of) or any(p.number < first and p.func is not None and p.is_floating for p in parents)
    }
    held = [of for of in held if not _is_fixed(of)]
    candidates = {groups[of.number - first] for of in held} - alive
    candidates -= _memories(made, groups, candidates)
    return [of for of in held if groups[of.number - first] in candidates]


def _joined(carried: Sequence[Sequence[TracedValue]], first: int) -> list[int]:
    """For each of some values, numbered from ``first``, the first one of those that are connected by what they carry."""
    groups = list(range(len(carried)))

    def group(index: int) -> int:
        while groups[index] != index:
            groups[index] = groups[groups[index]]
            index = groups[index]
        return index

    for index, parents in enumerate(carried):
        for parent in parents:
            if parent.number >= first:
                one, other = group(parent.number - first), group(index)
                groups[max(one, other)] = min(one, other)
    return [group(index) for index in range(len(carried))]


def _carried(value: TracedValue) -> Sequence[TracedValue]:
    """What a value may carry on, or can be made again from; positions, masks and the like are nobody's state."""
    if value.func is None or _is_layer(value):
        return ()
    operation = _operation(value)
    if operation is None or operation.views or operation.name in PASSED_ON:
        return [parent for parent in value.parents if not _is_fixed(parent)]
    return ()


def _operation(value: TracedValue) -> KnownOperation | None:
    """What is known of what made a value; None where that is a function of the recorder's own, which carries."""
    return operation_of(value.func) if hasattr(value.func, "overloadpacket") else None


def _is_layer(value: TracedValue) -> bool:
    """Whether a value is made by a matrix that is larger than what mixes streams, or by a convolution with such a one."""
    operation = _operation(value)
    if operation is None or operation.name != "convolution":
        return operation is not None and is_layer(operation, value.parents)
    return min(value.parents[1].shape[:2]) > MOST_STREAMS


def _is_fixed(value: TracedValue) -> bool:
    """Whether a value was computed from no parameter, and from no numbers of the batch but whole ones."""
    origins = walk([value], lambda of: of.parents)
    return not any(of.kind == PARAMETER or (of.kind == INPUT and of.is_floating) for of in origins)


def _memories(made: Sequence[TracedValue], groups: Sequence[int], candidates: set[int]) -> set[int]:
    """Of some groups of values those one of which was computed by a layer from another one: as a branch computes its part."""
    first, found = made[0].number, set[int]()
    origins: list[
        dict[int, bool]
    ] = []  # by value: the groups that it was computed from, and whether by a layer
    for of, group in zip(made, groups, strict=True):
        own: dict[int, bool] = {}
        for parent in of.parents if candidates else ():
            for origin, by_layer in origins[parent.number - first].items() if parent.number >= first else ():
                own[origin] = own.get(origin, False) or by_layer or _works(of)
        if own.get(group):
            found.add(group)
        if group in candidates:
            own.setdefault(group, False)
        origins.append(own)
    return found


def _works(value: TracedValue) -> bool:
    """Whether an operation is more than arithmetic on single elements: a layer, attention, or one that is not known."""
    operation = _operation(value)
    if operation is None:
        return value.func is None
    if operation.views or operation.carries or operation.name in FUNCTIONS:
        return _is_layer(value)
    return torch.Tag.pointwise not in operation.func.tags
