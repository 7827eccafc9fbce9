"""Which modes of torch does code of ours run under inside a hook? None to measure; the user's autocast to rerun a module.

A mode of the user's, such as a counter of operations, would see what we compute as if the user had computed it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

from depthscope.probes.model.errors import CaptureError

AUTOCAST_DEVICES = ("cpu", "cuda")


class _UserModes(threading.local):
    """The modes of the user's code around the running hook; per thread, as torch's own are."""

    autocast: Mapping[str, torch.dtype] = MappingProxyType({})  # by device
    gradients: bool | None = None  # None outside of a hook
    device: DeviceContext | None = None  # of `torch.set_default_device`


_user = _UserModes()


class outside_function_modes:
    """Look at tensors, and compute nothing, without a function mode of the user's: it would see that shapes are read."""

    __slots__ = ("modes",)

    def __enter__(self) -> None:
        self.modes: list[Any] = []
        while torch._C._len_torch_function_stack():
            self.modes.append(torch._C._pop_torch_function_stack())

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            torch._C._push_on_torch_function_stack(mode)


class outside_user_modes:
    """Compute without a graph, without the user's autocast and function and dispatch modes: a measurement inside a hook."""

    # A class with slots and not a generator: it is entered in every hook, and a generator takes three times as long.
    __slots__ = ("_before", "_dispatch", "_functions", "_noted")

    def __enter__(self) -> None:
        self._before = _user.autocast, _user.gradients, _user.device
        self._functions = outside_function_modes()
        self._dispatch: AbstractContextManager[Any] | None = None
        self._noted = False  # whether autocast and the graph were looked at, and may have been switched off
        try:
            # First of all, and entered again last of all: they would see even that a graph is switched off.
            self._functions.__enter__()
            gradients = torch.is_grad_enabled()
            active = {
                name: torch.get_autocast_dtype(name)
                for name in AUTOCAST_DEVICES
                if torch.is_autocast_enabled(name)
            }
            devices = [mode for mode in self._functions.modes if isinstance(mode, DeviceContext)]
            _user.autocast, _user.gradients, _user.device = active, gradients, devices[0] if devices else None
            self._noted = True
            # No graph: non-reentrant activation checkpointing counts the tensors saved for backward and raises when the
            # recomputation saves another number than the forward did.
            torch._C._set_grad_enabled(False)
            # No autocast: our products would be rounded to bfloat16. The flag alone: the type and the cache of cast weights
            # stay those of the user's forward.
            for name in active:
                torch.set_autocast_enabled(name, False)
            # Most programs have none, and leaving none takes longer than a hook may.
            if torch._C._len_torch_dispatch_stack() > 0:
                dispatch = _disable_current_modes()
                dispatch.__enter__()
                self._dispatch = dispatch
        except BaseException:  # such as the user's key, or a lack of memory: what was left is entered again
            self.__exit__(None, None, None)
            raise

    def __exit__(self, *error: Any) -> None:
        if self._dispatch is not None:
            self._dispatch.__exit__(*error)
        if self._noted:
            for name in _user.autocast:
                torch.set_autocast_enabled(name, True)
            torch._C._set_grad_enabled(bool(_user.gradients))
        _user.autocast, _user.gradients, _user.device = self._before
        self._functions.__exit__(*error)


@contextmanager
def user_modes() -> Iterator[None]:
    """Compute as the user's code around the running hook does: its autocast, its graph, its default device.

    Its other modes, such as a counter of operations, do not see what is computed.
    """
    device, autocast = _user.device, dict(_user.autocast)
    # Pushed and not entered, since torch has one global note of the device, which is there still.
    if device is not None:
        torch._C._push_on_torch_function_stack(device)
    try:
        for name in autocast:
            torch.set_autocast_enabled(name, True)
        with torch.set_grad_enabled(user_wants_graph()):
            yield
    finally:
        for name in autocast:
            torch.set_autocast_enabled(name, False)
        if device is not None:
            torch._C._pop_torch_function_stack()


def user_wants_graph() -> bool:
    """Whether the user's code around the running hook computes with a graph."""
    return torch.is_grad_enabled() if _user.gradients is None else _user.gradients


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type in which the user's code around the running hook multiplies a tensor: autocast's, or the tensor's own."""
    return _user.autocast.get(tensor.device.type, tensor.dtype)


def readable(lead: torch.Tensor | None) -> torch.Tensor:
    """The first tensor that the running forward was called with; its numbers have to be those that the user computes with."""
    called = ""
    if lead is None:
        raise CaptureError("the model was called without a tensor; expected a batch of tensors")
    if in_transformation():
        called = "inside a transformation of torch.func (grad, vmap, …), whose tensors stand for others"
    elif torch.jit.is_tracing() or torch.compiler.is_compiling():
        called = "while it was traced or exported"
    elif isinstance(lead, FakeTensor) or lead.is_meta:
        called = f"with {'meta' if lead.is_meta else 'fake'} tensors, which hold no values"
    elif lead.is_nested or lead.layout != torch.strided:
        kind = "nested" if lead.is_nested else "sparse"
        called = f"with a {kind} tensor, which has no axis of sequences; pad it, and pass a mask"
    if called:
        raise CaptureError(f"the model was called {called}; expected a plain call")
    return lead


def in_transformation() -> bool:
    """Whether the running code is inside of a transformation of torch.func, whose tensors stand for others."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def circumstances(model: nn.Module, batch: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """What decides which operations a forward of a model runs, as far as it is known before it runs."""
    shapes = tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in batch)
    device = batch[0].device.type if batch else "cpu"
    return (
        shapes,
        getattr(model, "training", None),  # frozen TorchScript has none
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device),
    )
