"""Hooks that see and never touch: they return nothing, swallow nothing silently, and vanish from copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


class Hook:
    """A hook whose errors go to a reporter, and of which a copy or pickle keeps an inert shell only.

    Parameters
    ----------
    function : callable, optional
        Called with the hook's arguments; what it returns is dropped. None makes an inert hook.
    report : callable, optional
        Called with an exception that the function raised.
    """

    __slots__ = ("function", "report")

    def __init__(
        self, function: Callable[..., Any] | None = None, report: Callable[[Exception], None] | None = None
    ):
        self.function = function
        self.report = report

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call the function and return nothing."""
        if self.function is None or self.report is None:
            return
        try:
            self.function(*args, **kwargs)
        except Exception as error:  # the user's forward or backward must go on
            self.report(error)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()  # a pickled or deep-copied model must not write into this one's records


class Attachment:
    """The hooks of one probe on one model, all removed together.

    Parameters
    ----------
    report : callable
        Called with every exception raised in a hook.
    """

    def __init__(self, report: Callable[[Exception], None]):
        self._report = report
        self._stack = ExitStack()

    def before(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Call ``function(module, args, kwargs)`` before the module's forward."""
        handle = module.register_forward_pre_hook(Hook(function, self._report), with_kwargs=True)
        self._stack.callback(handle.remove)

    def after(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Call ``function(module, args, kwargs, output)`` after the module's forward."""
        handle = module.register_forward_hook(Hook(function, self._report), with_kwargs=True)
        self._stack.callback(handle.remove)

    def remove(self) -> None:
        """Take every hook off; calling it twice is fine."""
        self._stack.close()


def in_recomputation() -> bool:
    """Whether a backward pass is running, so that a forward hook sees a checkpoint's recomputation."""
    return torch._C._current_graph_task_id() != -1


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in nested tuples, lists, dicts and model outputs, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def first_float(*values: Any) -> torch.Tensor | None:
    """First floating tensor with at least two axes, or None."""
    for tensor in tensors_in(values):
        if tensor.is_floating_point() and tensor.ndim >= 2:
            return tensor
    return None


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore random state, buffers and training flags of a model after a forward of our own."""
    held = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]
    flags = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in held:
                    module._buffers[name] = buffer  # a module may have put another tensor in its place
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
            for module, training in flags:
                module.training = training
