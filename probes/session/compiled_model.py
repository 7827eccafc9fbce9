"""How is a compiled model measured without a change of its own numbers? Its forward runs once more, as it is written.

Code that `torch.compile` made skips hooks that were put on since. Run uncompiled in a measured step, it would draw other
dropout masks, round otherwise, and train to other weights. So the user's call stays as it is, with nothing of ours inside of
it. Before it, the model runs uncompiled on copies of the same arguments; random states, buffers and the attributes of its
modules are restored afterwards. For gradients, hooks on the *outputs* of the user's call note ∂loss/∂output in the user's
backward, at whose end the backward of our own forward goes on from there: ∂loss/∂state = (∂output/∂state)ᵀ ∂loss/∂output.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import (
    Attachment,
    Hook,
    MethodWatch,
    Report,
    in_recomputation,
)
from depthscope.probes.model.layout import are_several
from depthscope.probes.model.modules import all_parameters
from depthscope.probes.model.preserved_state import COMPILER, preserved_state
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.model.user_modes import user_modes
from depthscope.probes.session.forward import Edge, Forward, backward_to, edges_behind, own_call, own_calls
from depthscope.probes.session.step import Step, running_backward

COMPILED_CALL = "_compiled_call_impl"  # where `Module.compile` keeps what runs in place of the module's call
COMPILED_FROM = "_torchdynamo_orig_callable"  # on functions that `torch.compile` made
IMMUTABLE = (int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))
# Namespaces of the operations by which torch's processes exchange tensors.
EXCHANGES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "symm_mem")

STEPPED = (
    "weights change before the backward of the step has ended, as by an optimizer in a hook, so the gradients of several "
    "outputs of a compiled model cannot be followed: record it without gradients"
)
EXCHANGED = (
    "a compiled model is measured by one more forward, in which {} would exchange something with other processes, which could "
    "wait for ever; record it uncompiled"
)


def is_compiled(module: nn.Module) -> bool:
    """Whether the call of a module runs compiled."""
    if vars(module).get(COMPILED_CALL) is not None or COMPILED_FROM in vars(module):
        return True
    # From the dictionaries: to ask a class of TorchScript's, or a property of the user's, would run code of theirs.
    places = (vars(module), *(vars(kind) for kind in type(module).__mro__))
    forward = next((place["forward"] for place in places if "forward" in place), None)
    return COMPILED_FROM in getattr(getattr(forward, "__func__", forward), "__dict__", ())


def inner_model(model: nn.Module) -> nn.Module:
    """The module inside of DistributedDataParallel, compiled or not: its modules have the same names in one process."""
    found, is_wrapped = model, False
    while True:
        is_parallel = isinstance(found, nn.parallel.DistributedDataParallel)
        # TorchScript's table of modules is no dict, and has items alone.
        inside = dict(found._modules.items()).get("module" if is_parallel else "_orig_mod")
        if inside is None:
            return found if is_wrapped else model
        found, is_wrapped = inside, is_wrapped or is_parallel


def compiled_callers(model: nn.Module, called: nn.Module) -> list[nn.Module]:
    """The modules that the user may call, where any part of them runs compiled; none where nothing does."""
    if COMPILER in sys.modules and any(map(is_compiled, called.modules())):
        return list(dict.fromkeys([called, model]))
    return []


@dataclass(eq=False)
class SecondForward:
    """A forward of ours on the arguments of one of the user's, and the gradients at the outputs of both."""

    forward: Forward
    outputs: list[torch.Tensor]
    backward: Callable[[Forward, list[torch.Tensor], list[torch.Tensor]], None]
    report: Report
    steps_in_backward: bool  # whether hooks of the user's may change weights before the backward has ended
    arrived: dict[int, torch.Tensor] = field(default_factory=dict)  # ∂loss/∂output of the user's, by number
    edges: dict[Edge, int] = field(default_factory=dict)  # of the user's outputs, with their numbers
    inner: set[int] = field(default_factory=set)  # outputs from which the user's graph computes other outputs
    read: set[int] | None = None  # outputs that the loss reads itself, where that was looked for

    def follow(self, user_output: Any) -> None:
        """Put hooks on the outputs of the user's call; they leave with the forward."""
        if user_output is None:  # the call raised, so it is no forward of a step
            self.forward.cancel()
            return
        theirs = list(tensors_in(user_output))
        if [t.shape for t in theirs] != [t.shape for t in self.outputs]:
            raise CaptureError(
                "the compiled model returned other tensors than its forward as it is written, so their gradients cannot be "
                "followed; record it without gradients, or without torch.compile"
            )
        for number, (tensor, own) in enumerate(zip(theirs, self.outputs, strict=True)):
            edge = tensor.grad_fn, tensor.output_nr
            if tensor.grad_fn is not None and own.requires_grad and edge not in self.edges:
                self.edges[edge] = number  # one tensor may be returned twice
                handle = tensor.register_hook(Hook(partial(self._note, number), self.report))
                self.forward.handles.append(handle)
        if len(self.edges) > 1:
            behind = (following for node, _ in self.edges for following in node.next_functions)
            self.inner = {self.edges[edge] for edge in edges_behind(behind) if edge in self.edges}

    def _note(self, number: int, gradient: torch.Tensor | None) -> None:
        # None for an output that the loss does not read, next to others of the same compiled code.
        if gradient is None:
            return
        begins, self.arrived[number] = not self.arrived, gradient.detach()
        if begins and self.inner and (roots := running_backward()) is not None:
            # Those that the running backward reaches without a way through other outputs.
            reached = edges_behind(roots, until=self.edges)
            self.read = {self.edges[edge] for edge in reached if edge in self.edges}
        if len(self.edges) - len(self.inner) == 1 and number not in self.inner:
            self._continue()  # at once: no weight can have changed yet, as by an optimizer inside of the backward
        elif begins:
            # The other outputs' gradients arrive later in this backward; torch calls this when it has ended.
            later = Hook(partial(self._continue, later=True), self.report)
            torch.autograd.Variable._execution_engine.queue_callback(later)

    def _continue(self, *, later: bool = False) -> None:
        arrived, self.arrived = self.arrived, {}
        # The gradient of an output from which others are computed contains theirs, as the user's graph has it. Where the
        # loss does not read that output itself, there is nothing else in it, and our own backward computes it.
        if self.inner and (self.read is None or self.inner & self.read):
            raise CaptureError(
                "the loss reads two outputs of the compiled model of which one is computed from the other, so their "
                "gradients cannot be separated; compile the whole model instead of its blocks, or record without gradients"
            )
        numbers = [number for number in arrived if number not in self.inner]
        if numbers and not self.forward.cancelled:
            if later and self.steps_in_backward:
                raise CaptureError(STEPPED)
            self.backward(self.forward, [self.outputs[n] for n in numbers], [arrived[n] for n in numbers])


class CompiledCalls:
    """What is on the outermost call of a compiled model: nothing in its compiled code, and a forward of ours before it.

    ``callers``: the modules that the user may call; see `compiled_callers`.
    ``wanted``: whether the call of a module that begins is to be measured.
    ``call_hooked``: calls a function with the session's hooks on the model; returns its result and the forward that these
    recorded.
    """

    def __init__(
        self,
        callers: list[nn.Module],
        owner: object,
        step: Step,
        wanted: Callable[[nn.Module], bool],
        call_hooked: Callable[[Callable[[], Any]], tuple[Any, Forward | None]],
    ):
        self._owner, self._step, self._wanted, self._call_hooked = owner, step, wanted, call_hooked
        self._attachment = Attachment(step.loss.report)
        self._calls = threading.local()
        self._lock = threading.Lock()
        for caller in callers:
            if vars(caller).get(COMPILED_CALL) is not None:
                # Hooks on this module would be compiled with it; around what replaces its call, nothing is.
                self._attachment.around(caller, COMPILED_CALL, self._around)
            else:
                # Before the user's own hooks: these run in our forward as well, on arguments that they did not see yet.
                self._attachment.before(caller, self._before, first=True)
                self._attachment.after(caller, self._after, always=True)

    def remove(self) -> None:
        """Take the hooks off."""
        self._attachment.remove()

    def _stack(self) -> list[SecondForward | None]:
        """The calls of callers that this thread is in."""
        stack: list[SecondForward | None] = self._calls.__dict__.setdefault("stack", [])
        return stack

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if own_calls.owner is None and not in_recomputation():
            stack = self._stack()
            stack.append(None)  # also where nothing is measured: one caller may call another
            if len(stack) == 1:
                stack[0] = self._measure(module, args, kwargs)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if own_calls.owner is None and not in_recomputation() and self._stack():
            second = self._stack().pop()
            if second is not None:
                second.follow(output)
            if not self._stack():
                self._step.loss.listen(output)

    def _around(self, module: nn.Module, args: Any, kwargs: Any) -> MethodWatch:
        self._before(module, args, kwargs)
        after = partial(self._after, module, args, kwargs)

        @contextmanager
        def ended_where_it_raises() -> Iterator[None]:
            try:
                yield
            except BaseException:
                after(None)
                raise

        return MethodWatch(ended_where_it_raises(), after)

    def _measure(self, module: nn.Module, args: Any, kwargs: Any) -> SecondForward | None:
        """Run the forward of a call once more, before the call itself."""
        if not self._wanted(module):
            return None
        module = inner_model(module)
        _require_repeatable(module)

        def run() -> Any:
            own_args, own_kwargs = _copied(args, kwargs)
            with user_modes():
                return module(*own_args, **own_kwargs)

        with self._own_run(module):
            output, forward = self._call_hooked(run)
        if forward is None or not self._step.options.gradients:
            return None
        # A write through .data is counted nowhere, so that the hooks that may make it are looked for.
        hooks = [getattr(p, "_post_accumulate_grad_hooks", None) or {} for p in all_parameters(module)]
        steps = any(type(hook) is not Hook for of in hooks for hook in of.values())
        backward = partial(self._run_backward, module)
        return SecondForward(forward, list(tensors_in(output)), backward, self._step.loss.report, steps)

    def _run_backward(
        self, module: nn.Module, forward: Forward, outputs: list[torch.Tensor], gradients: list[torch.Tensor]
    ) -> None:
        ends = forward.backward_ends()
        if not ends:  # as of a frozen trunk
            return
        try:
            with self._own_run(module):  # where a checkpoint runs its part of the model once more
                # Retained: the user may run another backward through the same call. It is freed when the step ends.
                backward_to(forward, ends, outputs, grad_outputs=gradients, retain_graph=True)
        except RuntimeError as error:
            raise (
                CaptureError(STEPPED) if "modified by an inplace operation" in str(error) else error
            ) from None

    @contextmanager
    def _own_run(self, module: nn.Module) -> Iterator[None]:
        """Run the model for ourselves: uncompiled, unseen by other recorders, and with everything as it was afterwards."""
        if not self._lock.acquire(blocking=False):
            raise CaptureError(
                "a compiled model was called by two threads at once; record one thread at a time, or do not compile it"
            )
        try:
            own, alone = own_call(self._owner), _NoExchange() if are_several() else nullcontext()
            with preserved_state(module), own, alone:
                yield
        finally:
            self._lock.release()


class _NoExchange(TorchDispatchMode):
    """Raises where something is about to be exchanged with other processes, before it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in EXCHANGES:
            raise CaptureError(EXCHANGED.format(func.name()))
        return func(*args, **(kwargs or {}))


def _require_repeatable(module: nn.Module) -> None:
    """Refuse a model whose forward cannot run once more without any effect."""
    for part in module.modules() if are_several() else ():
        name = type(part).__name__
        if (
            isinstance(part, nn.parallel.DistributedDataParallel)
            or name == "FullyShardedDataParallel"
            or hasattr(part, "_get_fsdp_state")
            or any(hasattr(p, "device_mesh") for p in part.parameters(recurse=False))
        ):
            raise CaptureError(
                EXCHANGED.format(f"its {name}, whose weights or calls are of several processes,")
            )
    if any(isinstance(p, nn.parameter.UninitializedTensorMixin) for p in module.parameters()):
        raise CaptureError("the model has parameters without a shape yet; call it once before it is measured")


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of a call's arguments, without their graph: a forward of ours may write into a batch, or a cache of tokens."""
    memo: dict[int, Any] = {}
    # Tensors first: those with a history cannot be copied by `copy`, which takes what it finds in the memo.
    for tensor in tensors_in((args, kwargs)):
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)

    def copied(value: Any) -> Any:
        if isinstance(value, IMMUTABLE):
            return value
        try:
            return copy.deepcopy(value, memo)
        except Exception as error:
            raise CaptureError(
                f"a compiled model is measured by one more forward, and its argument of type {type(value).__name__} cannot be "
                f"copied for it ({type(error).__name__}); record the model without torch.compile"
            ) from None

    return tuple(map(copied, args)), {name: copied(value) for name, value in kwargs.items()}
