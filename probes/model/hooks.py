"""How is a running model observed? By hooks and wrapped methods that change no result and disappear from copies."""

from __future__ import annotations

import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils.hooks import RemovableHandle

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.user_modes import outside_function_modes, outside_user_modes

INERT = "a hook of a probe was here"  # marks what copies of our hooks are
REENTRANT_FORWARD = torch.utils.checkpoint.CheckpointFunction.forward.__code__
PIPELINE_INFERENCE = ("_forward_metadata_inference", "_shape_inference")  # as releases of torch name it
Report: TypeAlias = Callable[[Exception], None]


def call_safely(
    report: Report, function: Callable[..., Any], *args: Any, computes: bool = True, **kwargs: Any
) -> Any:
    """Call a function of ours in the middle of the user's code, which none of its errors may reach.

    ``report``: called with what the function raised, without its frames.
    ``computes``: whether the function computes with tensors, so that it is to be outside of all of the user's modes.
    Returns: What it returned; None after an error.
    Raises BaseException: What stops the user's program (KeyboardInterrupt, SystemExit), and what the user's own signal
    handler raised while the function ran. The measurement is reported as interrupted then.
    """
    try:
        with outside_user_modes() if computes else outside_function_modes():
            return function(*args, **kwargs)
    except BaseException as error:
        # GeneratorExit as well: of the other kinds that are no Exception none can come from code of ours.
        if not isinstance(error, (Exception, GeneratorExit)):
            report(CaptureError(f"{type(error).__name__} interrupted the measurement"))
            raise
        if _from_signal_handler(error):
            report(CaptureError(f"a signal handler raised {type(error).__name__} during the measurement"))
            raise
        report(without_frames(error))
        return None


def without_frames(error: BaseException) -> Exception:
    """An error that no longer refers to the frames it passed, whose variables are the user's tensors; a note tells where."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is not None:
        code = place.tb_frame.f_code
        error.add_note(f"raised in {code.co_name}, {Path(code.co_filename).name}:{place.tb_lineno}")
    if not isinstance(error, Exception):  # GeneratorExit, which nobody may raise again by accident
        return CaptureError(f"{type(error).__name__}: {error}")
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def _from_signal_handler(error: BaseException) -> bool:
    """Whether an error passed through a signal handler of the user's: these run wherever the program is."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {getattr(handler, "__code__", None) for handler in handlers} - {None}
    place = error.__traceback__
    while place is not None and place.tb_frame.f_code not in codes:
        place = place.tb_next
    return place is not None


class Hook:
    """A hook whose errors go to a reporter, and whose copies and pickles do nothing.

    ``function``: called with the hook's arguments; its return value is dropped.
    ``report``: called with an exception that the function raised.
    ``computes``: whether the function computes with tensors. A hook on every module does not: it costs a third then.
    """

    __slots__ = ("computes", "function", "report")

    def __init__(self, function: Callable[..., Any], report: Report, *, computes: bool = True):
        self.function: Callable[..., Any] | None = function
        self.report = report
        self.computes = computes

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call the function and return None: any other value would replace the module's output."""
        # Nothing of ours may get into the user's compiled code: no operation, and no break of its graph.
        if not torch.compiler.is_compiling() and self.function is not None:
            call_safely(self.report, self.function, *args, computes=self.computes, **kwargs)

    def disable(self) -> None:
        """Do nothing from now on: a hook that is removed while torch goes through the hooks of a module is still called."""
        self.function = None

    def __reduce__(self) -> Any:
        # deepcopy and pickle take hooks along (an EMA copy, a saved model): the copy must not write into our records, and
        # a saved model must open where this package is not installed. This method takes everything and returns None.
        return getattr, (nullcontext(INERT), "__exit__")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # By their type: to ask a value for its class may run code of the user's. Those that contain this hook come before it.
        copies = [each for each in memo.values() if issubclass(type(each), nn.Module)]
        # What `copy` keeps until the copy is complete.
        memo.setdefault(id(memo), []).append(_AtEndOfCopy(copies))
        function, args = self.__reduce__()
        return function(*args)


class _AtEndOfCopy:
    """Removes what is left of our hooks in copies of modules, when nobody holds this any more."""

    def __init__(self, copies: list[nn.Module]):
        self._copies = copies

    def __del__(self) -> None:
        for copied in self._copies:
            remove_inert_hooks(copied)


def remove_inert_hooks(model: nn.Module) -> None:
    """Remove what copies of hooks left on a model, one of whose modules may be a copy of a probed one."""
    for module in model.modules():
        for table, more in (
            (module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]),
            (module._forward_hooks, [module._forward_hooks_with_kwargs, module._forward_hooks_always_called]),
        ):
            of = {key: getattr(hook, "__self__", None) for key, hook in table.items()}
            inert = [key for key, o in of.items() if isinstance(o, nullcontext) and o.enter_result == INERT]
            for key in inert:
                del table[key]
            for each in more:  # also of hooks that the user cleared from the table alone
                for key in each.keys() - table.keys():
                    del each[key]


def _new_key() -> int:
    """A key of torch's tables of hooks that nobody else gets."""
    key = RemovableHandle.next_id
    RemovableHandle.next_id += 1
    return key


@dataclass
class MethodWatch:
    """A context to run a method in, and a function that receives its result."""

    mode: AbstractContextManager[Any]
    done: Callable[[Any], object]


Watcher: TypeAlias = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], MethodWatch | None]


class Attachment:
    """The hooks of one probe on one model, all removed together; ``report`` is called with every exception in one."""

    def __init__(self, report: Report):
        self._report = report
        self._hooks: dict[Callable[..., Any], tuple[Hook, int]] = {}  # by what each calls, with its key
        self._placed: list[tuple[dict[int, Any], int]] = []  # tables of modules, with the key of ours in each
        self._watched: list[WatchedMethod] = []

    def before(
        self, module: nn.Module, function: Callable[..., Any], *, first: bool = False, computes: bool = True
    ) -> None:
        """Call ``function(module, args, kwargs)`` before the module's forward; ``first``: before the user's own hooks."""
        table = module._forward_pre_hooks
        key = self._place(table, module._forward_pre_hooks_with_kwargs, function, computes)
        if first:
            table.move_to_end(key, last=False)

    def after(
        self, module: nn.Module, function: Callable[..., Any], *, always: bool = False, computes: bool = True
    ) -> None:
        """Call ``function(module, args, kwargs, output)`` after the module's forward; ``always``: also when it raised."""
        key = self._place(module._forward_hooks, module._forward_hooks_with_kwargs, function, computes)
        if always:
            module._forward_hooks_always_called[key] = True
            self._placed.append((module._forward_hooks_always_called, key))

    def _place(
        self,
        table: dict[int, Any],
        with_kwargs: dict[int, bool],
        function: Callable[..., Any],
        computes: bool,
    ) -> int:
        # As torch's own methods do, which TorchScript's modules forbid. One hook for all modules with the same function: every
        # object of ours brings the next complete collection of garbage nearer, which takes longer than all hooks.
        if function not in self._hooks:
            self._hooks[function] = Hook(function, self._report, computes=computes), _new_key()
        hook, key = self._hooks[function]
        if key in table:  # the same function once more on this module
            key = _new_key()
        table[key], with_kwargs[key] = hook, True
        self._placed += [(with_kwargs, key), (table, key)]
        return key

    def run_last(self) -> None:
        """Move the hooks behind those that the user put on since: what a hook of the user's returns is the state."""
        own = [hook for hook, _ in self._hooks.values()]
        for table, _ in self._placed:
            last = table[next(reversed(table))] if table else True
            if last is True or type(last) is Hook:  # a note about a hook, or one of ours
                continue
            # All of ours in this table, in their order: the first one that is found overtaken moves them all.
            ours = [key for key, hook in table.items() if hook in own]
            for key in ours:
                table.move_to_end(key)  # type: ignore[attr-defined]

    def around(self, module: nn.Module, name: str, watcher: Watcher) -> None:
        """Observe every call of one method of a module; torch has hooks for the forward only.

        ``watcher(module, args, kwargs)`` returns the context to run the method in, or None to only run the method.
        """
        watched = WatchedMethod(module, name, watcher, self._report)
        vars(module)[name] = watched
        self._watched.append(watched)

    def remove(self) -> None:
        """Remove every hook; calling it twice is fine."""
        for hook, _ in self._hooks.values():
            hook.disable()
        for watched in reversed(self._watched):
            watched.remove()
        for table, key in self._placed:
            table.pop(key, None)  # the user may have cleared it
        self._hooks, self._placed, self._watched = {}, [], []


class WatchedMethod:
    """A method of one module that is observed while it runs; copies and pickles of the module get the plain method."""

    __slots__ = ("_instance_entry", "_method", "_module", "_name", "_report", "_watcher")

    def __init__(self, module: nn.Module, name: str, watcher: Watcher, report: Report) -> None:
        self._module, self._name, self._report = module, name, report
        self._watcher: Watcher | None = watcher
        # Mostly None: the method is the class's. Libraries may set one on the instance, as accelerate does for forward.
        self._instance_entry = vars(module).get(name)
        self._method = getattr(module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method unchanged, in the watcher's context, and return its result."""
        watch = None
        if not torch.compiler.is_compiling() and self._watcher is not None:  # as in `Hook`
            watch = call_safely(self._report, self._watcher, self._module, args, kwargs)
        if watch is None:
            return self._method(*args, **kwargs)
        with watch.mode:
            result = self._method(*args, **kwargs)
        call_safely(self._report, watch.done, result)
        return result

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the method, by which a mask that is given by its position has its name."""
        return inspect.signature(self._method)

    def remove(self) -> None:
        """Restore the module's own entry; where somebody wrapped this one since, only stop watching."""
        self._watcher = None
        # Another probe may have wrapped the method since, and stay on: it is to call what this one called.
        outer, entry = None, vars(self._module).get(self._name)
        while isinstance(entry, WatchedMethod) and entry is not self:
            outer, entry = entry, entry._instance_entry
        if entry is not self:
            return
        if outer is not None:
            outer._instance_entry, outer._method = self._instance_entry, self._method
        # Not by setattr and delattr, which nn.Module and its subclasses override.
        elif self._instance_entry is None:  # the class's method shows again
            del vars(self._module)[self._name]
        else:
            vars(self._module)[self._name] = self._instance_entry

    def unwatched_entry(self) -> Any:
        """What the instance had before any probe; None where the method is the class's."""
        entry = self._instance_entry
        return entry.unwatched_entry() if isinstance(entry, WatchedMethod) else entry

    def __reduce__(self) -> Any:
        # A copy of the module is rebuilt with what was there before us: its instance entry, or the class's method bound
        # to the copy of the module.
        entry = self.unwatched_entry()
        if entry is not None:
            return itemgetter(0), ((entry,),)
        return getattr, (self._module, self._name)


def running_frames(innermost: FrameType | None = None) -> Iterator[FrameType]:
    """The frames of the running code, or of that of another thread by its innermost frame, from there on."""
    frame: FrameType | None = innermost or sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def in_recomputation() -> bool:
    """Whether a backward pass is running, so that a forward hook sees the recomputation of a checkpointed module."""
    # -1 outside of a backward. Activation checkpointing gives no public sign inside of the recomputed forward.
    return torch._C._current_graph_task_id() != -1


def in_reentrant_checkpoint() -> bool:
    """Whether a reentrant checkpoint is running its forward, whose graph is made later, in the backward."""
    return any(frame.f_code is REENTRANT_FORWARD for frame in running_frames())


def in_pipeline_inference() -> bool:
    """Whether torch's pipeline runs a stage only to learn the shapes of what it returns.

    Before its first step a schedule calls each stage once more, on memory that holds no data, and runs a backward of ones
    through it: a forward like any other, and no part of the training.
    """
    stage = sys.modules.get("torch.distributed.pipelining.stage")
    if stage is None:
        return False
    codes = (frame.f_code for frame in running_frames())
    return any(code.co_name in PIPELINE_INFERENCE and code.co_filename == stage.__file__ for code in codes)


def num_running_calls(model: nn.Module) -> int:
    """How many calls of the model, one inside of another, the running code was called by."""
    # By name: what torch's method is wrapped in differs between versions.
    calls = (frame for frame in running_frames() if frame.f_code.co_name == "_call_impl")
    return sum(frame.f_locals.get("self") is model for frame in calls)
