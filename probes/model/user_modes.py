"""Which modes of torch does code of ours run under inside a hook? None to measure; the user's autocast to rerun a module.

A mode of the user's, such as a counter of operations, would see what we compute as if the user had computed it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

AUTOCAST_DEVICES = ("cpu", "cuda")


class _UserAutocast(threading.local):
    """The autocast types of the user's code by device; per thread, as torch's own autocast state is."""

    types: Mapping[str, torch.dtype] = MappingProxyType({})


_user_autocast = _UserAutocast()


@contextmanager
def outside_user_modes() -> Iterator[None]:
    """Compute without a graph, without the user's autocast and function and dispatch modes: a measurement inside a hook."""
    # No graph: non-reentrant activation checkpointing counts the tensors saved for backward and raises when the
    # recomputation saves another number than the forward did. No autocast: our products would be rounded to bfloat16.
    active = {
        device: torch.get_autocast_dtype(device)
        for device in AUTOCAST_DEVICES
        if torch.is_autocast_enabled(device)
    }
    previous, _user_autocast.types = _user_autocast.types, active
    functions: list[Any] = []
    try:
        # The flag alone: the type and the cache of cast weights stay those of the user's forward.
        for device in active:
            torch.set_autocast_enabled(device, False)
        while torch._C._len_torch_function_stack():
            functions.append(torch._C._pop_torch_function_stack())
        # Most programs have none, and leaving none takes longer than a hook may.
        some = torch._C._len_torch_dispatch_stack() > 0
        with torch.no_grad(), _disable_current_modes() if some else nullcontext():
            yield
    finally:
        for mode in reversed(functions):
            torch._C._push_on_torch_function_stack(mode)
        for device in active:
            torch.set_autocast_enabled(device, True)
        _user_autocast.types = previous


@contextmanager
def user_autocast() -> Iterator[None]:
    """Compute under the autocast of the user's code around the running hook, to run a module of the model again."""
    active = dict(_user_autocast.types)
    try:
        for device in active:
            torch.set_autocast_enabled(device, True)
        yield
    finally:
        for device in active:
            torch.set_autocast_enabled(device, False)


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type in which the user's code around the running hook multiplies a tensor: autocast's, or the tensor's own."""
    return _user_autocast.types.get(tensor.device.type, tensor.dtype)


def unreadable_mode(tensor: torch.Tensor) -> str | None:
    """Why the states of the running forward are no numbers that can be read, or mean something else; None where they can."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a transformation of torch.func (grad, vmap, …), whose tensors stand for others"
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return "while it was traced or exported"
    if isinstance(tensor, FakeTensor):
        return "with fake tensors, which hold no values"
    return None
