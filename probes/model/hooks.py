"""Hooks that see and never touch: they return nothing, swallow nothing silently, and vanish from copies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import nn

KINDS = ("cpu", "cuda")  # devices with autocast


class _Outside(threading.local):
    """What the user's code computes in, while a hook of ours runs."""

    autocast: Mapping[str, torch.dtype] = MappingProxyType({})


_outside = _Outside()


@contextmanager
def quiet() -> Iterator[None]:
    """Compute without a graph, which a checkpoint around us would count, and without the user's autocast."""
    on = {kind: torch.get_autocast_dtype(kind) for kind in KINDS if torch.is_autocast_enabled(kind)}
    before, _outside.autocast = _outside.autocast, on
    try:
        for kind in on:
            torch.set_autocast_enabled(kind, False)
        with torch.no_grad():
            yield
    finally:
        for kind in on:
            torch.set_autocast_enabled(kind, True)
        _outside.autocast = before


@contextmanager
def as_outside() -> Iterator[None]:
    """Compute as the user's code around the running hook does: to run a part of the model once more."""
    on = dict(_outside.autocast)
    try:
        for kind in on:
            torch.set_autocast_enabled(kind, True)
        yield
    finally:
        for kind in on:
            torch.set_autocast_enabled(kind, False)


def computed_in(tensor: torch.Tensor) -> torch.dtype:
    """The precision that the user's code around the running hook multiplies a tensor in: autocast's, or its own."""
    return _outside.autocast.get(tensor.device.type, tensor.dtype)


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
            with quiet():
                self.function(*args, **kwargs)
        except Exception as error:  # the user's forward or backward must go on
            self.report(error)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()  # a pickled or deep-copied model must not write into this one's records


@dataclass
class Seeing:
    """A mode to run a method in, and what to do with its result."""

    mode: AbstractContextManager[Any]
    done: Callable[[Any], None]


Watcher: TypeAlias = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Seeing | None]


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

    def around(self, module: nn.Module, name: str, watcher: Watcher) -> None:
        """Look at every call of one method of a module, for a method has no hooks.

        Parameters
        ----------
        module : Module
            The module; its own entry for the method is put back by `remove`.
        name : str
            The method's name.
        watcher : callable
            ``watcher(module, args, kwargs)`` gives the mode to run the method in, or None to leave the call alone.
        """
        seen = SeenMethod(module, name, watcher, self._report)
        vars(module)[name] = seen
        self._stack.callback(seen.remove)

    def remove(self) -> None:
        """Take every hook off; calling it twice is fine."""
        self._stack.close()


class SeenMethod:
    """A method of one module that is looked at while it runs; copies and pickles of the module hold the plain method.

    Parameters
    ----------
    module : Module
        Whose method it is.
    name : str
        The method's name.
    watcher : callable
        As in `Attachment.around`.
    report : callable
        Called with every exception of the watcher.
    """

    __slots__ = ("_held", "_method", "_module", "_name", "_report", "_watcher")

    def __init__(
        self, module: nn.Module, name: str, watcher: Watcher, report: Callable[[Exception], None]
    ) -> None:
        self._module, self._name, self._report = module, name, report
        self._watcher: Watcher | None = watcher
        self._held = vars(module).get(name)
        self._method = getattr(module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method as it is, and look on."""
        watch = self._guarded(self._watcher, self._module, args, kwargs) if self._watcher else None
        if watch is None:
            return self._method(*args, **kwargs)
        with watch.mode:
            result = self._method(*args, **kwargs)
        self._guarded(watch.done, result)
        return result

    def remove(self) -> None:
        """Put the module's own entry back; where somebody wrapped this one since, fall silent in its place."""
        self._watcher = None
        if vars(self._module).get(self._name) is self:
            del vars(self._module)[self._name]
            if self._held is not None:
                vars(self._module)[self._name] = self._held

    def _guarded(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            with quiet():
                return function(*arguments)
        except Exception as error:  # the user's forward must go on
            self._report(error)
            return None

    def __reduce__(self) -> Any:
        if self._held is not None:
            return _itself, (self._held,)
        return getattr, (self._module, self._name)


def _itself(value: Any) -> Any:
    return value


def stand_in(stack: ExitStack, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Put a function in the place of a module's method while the stack is open, for a method has no hooks.

    Parameters
    ----------
    stack : ExitStack
        Puts the module's own entry back.
    module : Module
        The module.
    name : str
        The method's name.
    function : callable
        What is called in its place.
    """
    own = vars(module).get(name)

    def restore() -> None:
        del vars(module)[name]
        if own is not None:
            vars(module)[name] = own

    vars(module)[name] = function
    stack.callback(restore)


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


def floats_in(*values: Any) -> list[torch.Tensor]:
    """Floating tensors with at least two axes, in order."""
    return [tensor for tensor in tensors_in(values) if tensor.is_floating_point() and tensor.ndim >= 2]


def first_float(*values: Any) -> torch.Tensor | None:
    """First floating tensor with at least two axes, or None."""
    return next(iter(floats_in(values)), None)


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
