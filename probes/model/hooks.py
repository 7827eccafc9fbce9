"""How is a running model observed? By hooks and wrapped methods that change no result and disappear from copies."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from depthscope.probes.model.autocast import no_grad_no_autocast


class Hook:
    """A hook whose errors go to a reporter, and whose copies and pickles do nothing.

    Parameters
    ----------
    function : callable, optional
        Called with the hook's arguments; its return value is dropped. None makes a hook that does nothing.
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
        """Call the function and return None: any other value would replace the module's output."""
        if self.function is None or self.report is None:
            return
        try:
            with no_grad_no_autocast():
                self.function(*args, **kwargs)
        except Exception as error:  # the user's forward or backward must go on
            self.report(error)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        # deepcopy and pickle take hooks along (an EMA copy, a saved model): the copy must not write into our records.
        return Hook, ()


@dataclass
class MethodWatch:
    """A context to run a method in, and a function that receives its result."""

    mode: AbstractContextManager[Any]
    done: Callable[[Any], None]


Watcher: TypeAlias = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], MethodWatch | None]


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
        """Observe every call of one method of a module; torch has hooks for the forward only.

        Parameters
        ----------
        module : Module
            The module; `remove` restores its own entry for the method.
        name : str
            The method's name.
        watcher : callable
            ``watcher(module, args, kwargs)`` returns the context to run the method in, or None to only run the method.
        """
        watched = WatchedMethod(module, name, watcher, self._report)
        vars(module)[name] = watched
        self._stack.callback(watched.remove)

    def remove(self) -> None:
        """Remove every hook; calling it twice is fine."""
        self._stack.close()


class WatchedMethod:
    """A method of one module that is observed while it runs; copies and pickles of the module get the plain method.

    Parameters
    ----------
    module : Module
        The module that the method belongs to.
    name : str
        The method's name.
    watcher : callable
        As in `Attachment.around`.
    report : callable
        Called with every exception of the watcher.
    """

    __slots__ = ("_instance_entry", "_method", "_module", "_name", "_report", "_watcher")

    def __init__(
        self, module: nn.Module, name: str, watcher: Watcher, report: Callable[[Exception], None]
    ) -> None:
        self._module, self._name, self._report = module, name, report
        self._watcher: Watcher | None = watcher
        # Mostly None: the method is the class's. Libraries may set one on the instance, as accelerate does for forward.
        self._instance_entry = vars(module).get(name)
        self._method = getattr(module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method unchanged, in the watcher's context, and return its result."""
        watch = self._report_errors(self._watcher, self._module, args, kwargs) if self._watcher else None
        if watch is None:
            return self._method(*args, **kwargs)
        with watch.mode:
            result = self._method(*args, **kwargs)
        self._report_errors(watch.done, result)
        return result

    def remove(self) -> None:
        """Restore the module's own entry; where somebody wrapped this one since, only stop watching."""
        self._watcher = None
        if vars(self._module).get(self._name) is self:
            _set_entry(self._module, self._name, self._instance_entry)

    def _report_errors(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            with no_grad_no_autocast():
                return function(*arguments)
        except Exception as error:  # the user's forward must go on
            self._report(error)
            return None

    def __reduce__(self) -> Any:
        # A copy of the module is rebuilt with what was there before us: its instance entry, or the class's method bound
        # to the copy of the module.
        if self._instance_entry is not None:
            return _identity, (self._instance_entry,)
        return getattr, (self._module, self._name)


def _identity(value: Any) -> Any:
    return value


def _set_entry(module: nn.Module, name: str, value: Any) -> None:
    """Put an entry into the instance's dict; None removes it, so that the class's method shows again."""
    # Not by setattr, which nn.Module and its subclasses override.
    if value is None:
        del vars(module)[name]
    else:
        vars(module)[name] = value


def replace_method(stack: ExitStack, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Replace a method of a module by a function until the stack closes; torch has hooks for the forward only.

    Parameters
    ----------
    stack : ExitStack
        Restores the module's own entry when it closes.
    module : Module
        The module.
    name : str
        The method's name.
    function : callable
        Called in place of the method.
    """
    stack.callback(_set_entry, module, name, vars(module).get(name))
    vars(module)[name] = function


def in_recomputation() -> bool:
    """Whether a backward pass is running, so that a forward hook sees the recomputation of a checkpointed module."""
    # -1 outside of a backward. Activation checkpointing gives no public sign inside of the recomputed forward.
    return torch._C._current_graph_task_id() != -1
