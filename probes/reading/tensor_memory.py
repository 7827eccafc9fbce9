"""Which memory does a tensor lie in? Places in it, and what is in them after a write."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from depthscope.probes.reading.graph import FILLS, TracedValue


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
