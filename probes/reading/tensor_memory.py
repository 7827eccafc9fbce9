"""Which memory does a tensor lie in? Places in it, and what is in them after a write."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from depthscope.probes.reading.graph import FILLS, TracedValue
from depthscope.probes.reading.operations import (
    CARRYING,
    FUNCTIONS,
    MIXES,
    MOST_STREAMS,
    KnownOperation,
    is_layer,
    operation_of,
)


def geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where the elements of a tensor lie in its memory: shape, stride, offset."""
    if tensor.layout is not torch.strided:
        return tuple(tensor.shape), (), 0
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


class TensorEntry(weakref.ref):
    """The value that a tensor has, and how many writes into its memory it knows of."""

    __slots__ = ("value", "writes")

    value: TracedValue
    writes: int


def storage_of(tensor: torch.Tensor) -> int:
    """What tensors in the same memory have in common."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # a tensor without memory of its own, as a wrapper's
        return id(tensor)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is none of a kind of its own, as one that is spread over processes."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def is_imagined(of: type) -> bool:
    """Whether tensors of a class have no numbers: PyTorch tries shapes alone with them, as it does to place a DTensor."""
    return of.__name__ == "FakeTensor"  # by name: importing it takes long


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor that is spread over processes (a DTensor) the part that this one has; any other as it is."""
    return tensor if is_plain(tensor) else getattr(tensor, "_local_tensor", tensor)


def unseen_by_modes(*tensors: torch.Tensor) -> AbstractContextManager[Any]:
    """A context in which no mode, as of another recorder, sees operations on some tensors, where these are plain ones."""
    return torch._C._DisableTorchDispatch() if all(map(is_plain, tensors)) else nullcontext()


def detached(tensor: torch.Tensor, *, copy: bool = False) -> torch.Tensor:
    """A tensor without its place in autograd's graph."""
    with unseen_by_modes(tensor):
        found = tensor.detach()
        return found.clone() if copy else found


def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors along a new first axis, by no operation that a mode sees."""
    with unseen_by_modes(*tensors):
        return torch.stack([tensor.detach() for tensor in tensors])


def filled_with(value: TracedValue, tensor: torch.Tensor) -> torch.Tensor:
    """A constant, without memory of its size."""
    fill = FILLS[value.name]
    if fill is None:
        fill = value.args[2 if value.name == "new_full" else 1]
    with unseen_by_modes(tensor):
        return torch.full((), fill, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def patched(old: torch.Tensor, new: torch.Tensor, own: Any, where: Any, empty: float = 0) -> torch.Tensor:
    """A tensor after another one was written into its memory; both by their `geometry`."""
    ends = [
        o + sum((s - 1) * t for s, t in zip(shape, stride, strict=True)) for shape, stride, o in (own, where)
    ]
    flat = torch.full((1 + max(ends),), empty, dtype=old.dtype, device=old.device)
    flat.as_strided(*own).copy_(old)
    flat.as_strided(*where).copy_(new)
    return flat.as_strided(*own).clone()


# What these take may go on in what they give, or that is made again from it.
PASSED_ON = CARRYING | FUNCTIONS | MIXES
FEWEST_BYTES = 2**16  # smaller tensors weigh less than what is noted of them


def can_end(value: TracedValue, tensor: torch.Tensor) -> bool:
    """Whether a tensor that is held is worth while letting go: a large one that an operation made."""
    return value.func is not None and tensor.numel() * tensor.element_size() >= FEWEST_BYTES


def ended(
    held: Sequence[TracedValue], made: Sequence[TracedValue], is_alive: Callable[[TracedValue], bool]
) -> list[TracedValue]:
    """Of what is held, what no memory can need after a call that made these values; ``is_alive``: others have its tensor."""
    first = made[0].number
    groups = _joined(made)
    held = [of for of in held if not of.is_fixed]
    candidates = {groups[of.number - first] for of in held}
    for of, group in zip(made, groups, strict=True):
        # What carries on a value from before the call may be a state.
        before = (p for p in _carried(of) if p.number < first and p.func is not None and p.is_floating)
        if group in candidates and (is_alive(of) or any(before)):
            candidates.remove(group)
    candidates -= _memories(made, groups, candidates)
    return [of for of in held if groups[of.number - first] in candidates]


def _joined(made: Sequence[TracedValue]) -> list[int]:
    """For each of some values the place of the first one of those that are connected by what they carry."""
    first, groups = made[0].number, list(range(len(made)))

    def group(index: int) -> int:
        while groups[index] != index:
            groups[index] = groups[groups[index]]
            index = groups[index]
        return index

    for index, of in enumerate(made):
        for parent in _carried(of):
            if parent.number >= first:
                one, other = group(parent.number - first), group(index)
                groups[max(one, other)] = min(one, other)
    return [group(index) for index in range(len(made))]


def _carried(value: TracedValue) -> Sequence[TracedValue]:
    """What a value may carry on, or can be made again from; positions, masks and the like are nobody's state."""
    if value.carries is None:  # it is asked for again at the end of each call around
        operation = _operation(value)
        passes = operation is None or operation.views or operation.name in PASSED_ON
        passes = passes and value.func is not None and not _is_layer(value)
        value.carries = [parent for parent in value.parents if passes and not parent.is_fixed]
    return value.carries


def _operation(value: TracedValue) -> KnownOperation | None:
    """What is known of what made a value; None where that is a function of the recorder's own, which carries."""
    return operation_of(value.func) if hasattr(value.func, "overloadpacket") else None


def _is_layer(value: TracedValue) -> bool:
    """Whether a value is made by a matrix that is larger than what mixes streams, or by a convolution with such a one."""
    operation = _operation(value)
    if operation is None or operation.name != "convolution":
        return operation is not None and is_layer(operation, value.parents)
    return min(value.parents[1].shape[:2]) > MOST_STREAMS


def _memories(made: Sequence[TracedValue], groups: Sequence[int], candidates: set[int]) -> set[int]:
    """Of some groups of values those one of which was computed by a layer from another one: as a branch computes its part."""
    first, found = made[0].number, set[int]()
    # By value: the groups that it was computed from, and whether by a layer.
    origins: list[dict[int, bool]] = []
    for of, group in zip(made if candidates else (), groups, strict=False):
        own: dict[int, bool] = {}
        for parent in of.parents:
            for origin, by_layer in origins[parent.number - first].items() if parent.number >= first else ():
                own[origin] = own.get(origin, False) or by_layer or _is_layer(of)
        if own.get(group):
            found.add(group)
        if group in candidates:
            own.setdefault(group, False)
        origins.append(own)
    return found
