"""How is a compiled model measured without a change of its own numbers? Its forward runs once more, as it is written.

Code that `torch.compile` made skips hooks that were put on since. Run uncompiled in a measured step, it would draw other
dropout masks, round otherwise, and train to other weights. So the user's call stays as it is, with nothing of ours inside of
it. Before it, the model runs uncompiled on copies of the same arguments; random states, buffers and the attributes of its
modules are restored afterwards. For gradients, hooks on the *outputs* of the user's call note ∂loss/∂output in the user's
backward, at whose end the backward of our own forward goes on from there: ∂loss/∂state = (∂output/∂state)ᵀ ∂loss/∂output.
"""

from __future__ import annotations

import copy
import gc
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Attachment, Hook, MethodWatch, Report, in_recomputation
from depthscope.probes.model.modules import all_parameters
from depthscope.probes.model.preserved_state import preserved_attributes, preserved_state
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.model.user_modes import user_modes
from depthscope.probes.model.while_needed import eager
from depthscope.probes.session.backward_roots import Edge, edges_behind, running_backward
from depthscope.probes.session.compiled_regions import COMPILED_CALL, is_compiled
from depthscope.probes.session.forward import Forward, own_call, own_calls
from depthscope.probes.session.gradient_hooks import backward_to

IMMUTABLE = (int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))

STEPPED = (
    "weights change before the backward of the step has ended, as by an optimizer in a hook, so the gradients of several "
    "outputs of a compiled model cannot be followed: record it without gradients"
)
RunHooked: TypeAlias = Callable[[Callable[[], Any]], tuple[Any, Forward | None]]


def compiler_is_loaded() -> bool:
    """Whether torch's compiler is in use at all: its import takes a second, which `torch.compile` does and we must not."""
    return "torch._dynamo" in sys.modules


def compiled_callers(
    model: nn.Module, *, known: Sequence[nn.Module] = (), search: bool = False
) -> list[nn.Module]:
    """The modules whose call is the model's outermost one, where any part of it runs compiled; empty where none does.

    ``known``: compiled modules that contain the model, as `torch.compile` returns: the model does not know of these.
    ``search``: look for such modules among all that live, which takes some milliseconds for every 100 000 objects of
    the program.
    """
    around = (
        [m for m in living_modules() if is_compiled(m) and _contains(m, model)] if search else list(known)
    )
    if around or any(is_compiled(module) for module in model.modules()):
        return [*around, model]
    return []


def living_modules() -> list[nn.Module]:
    """All modules of the process."""
    # By the type and not by isinstance, which asks an object for its class and may wake a proxy of the user's. One whose
    # __init__ has not run yet is none.
    return [m for m in gc.get_objects() if issubclass(type(m), nn.Module) and "_modules" in vars(m)]


def _contains(outer: nn.Module, model: nn.Module) -> bool:
    return outer is not model and any(module is model for module in outer.modules())


@dataclass(eq=False)
class SecondForward:
    """A forward of ours on the arguments of one of the user's, and the gradients at the outputs of both."""

    forward: Forward
    outputs: list[torch.Tensor]
    backward: Callable[[SecondForward], None]
    report: Report
    steps_in_backward: bool = (
        False  # whether hooks of the user's may change weights before the backward has ended
    )
    arrived: dict[int, torch.Tensor] = field(default_factory=dict)  # ∂loss/∂output of the user's, by number
    edges: dict[Edge, int] = field(default_factory=dict)  # of the user's outputs, with their numbers
    inner: set[int] = field(default_factory=set)  # outputs from which the user's graph computes other outputs
    read: set[int] | None = None  # outputs that the loss reads itself, where that was looked for

    def follow(self, user_output: Any) -> None:
        """Put hooks on the outputs of the user's call; they leave with the forward."""
        if user_output is None:  # the call raised, so it is no forward of a step
            self.forward.cancelled = True
            self.forward.release()
            return
        theirs = list(tensors_in(user_output))
        if [t.shape for t in theirs] != [t.shape for t in self.outputs]:
            raise CaptureError(
                "the compiled model returned other tensors than its forward as it is written, so their gradients cannot be "
                "followed; record it without gradients, or without torch.compile"
            )
        for number, (tensor, own) in enumerate(zip(theirs, self.outputs, strict=True)):
            if tensor.grad_fn is not None and own.requires_grad:
                edge = tensor.grad_fn, tensor.output_nr
                if edge not in self.edges:  # one tensor may be returned twice
                    self.edges[edge] = number
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
        if begins:
            self.read = self._read_by_loss() if self.inner else None
        if len(self.edges) - len(self.inner) == 1 and number not in self.inner:
            self._continue()  # at once: no weight can have changed yet, as by an optimizer inside of the backward
        elif begins:
            # The other outputs' gradients arrive later in this backward; torch calls this when it has ended.
            torch.autograd.Variable._execution_engine.queue_callback(
                Hook(partial(self._continue, later=True), self.report)
            )

    def _read_by_loss(self) -> set[int] | None:
        """The outputs that the running backward reaches without a way through other outputs; None where it is not found."""
        roots = running_backward()
        if roots is None:
            return None
        return {self.edges[edge] for edge in edges_behind(roots, until=self.edges) if edge in self.edges}

    def _continue(self, *, later: bool = False) -> None:
        try:
            # The gradient of an output from which others are computed contains theirs, as the user's graph has it. Where the
            # loss does not read that output itself, there is nothing else in it, and our own backward computes it.
            if self.inner and (self.read is None or self.inner & self.read):
                raise CaptureError(
                    "the loss reads two outputs of the compiled model of which one is computed from the other, so their "
                    "gradients cannot be separated; compile the whole model instead of its blocks, or record without "
                    "gradients"
                )
            for number in self.inner:
                self.arrived.pop(number, None)
            if not self.arrived or self.forward.cancelled:
                return
            if later and self.steps_in_backward:
                raise CaptureError(STEPPED)
            self.backward(self)
        finally:
            self.arrived = {}


class CompiledCalls:
    """What is on the outermost call of a compiled model: nothing in its compiled code, and a forward of ours before it.

    ``callers``: the modules that the user may call; see `compiled_callers`.
    ``wanted``: whether the call that begins is to be measured.
    ``run_hooked``: calls a function with the session's hooks on the model; returns its result and the forward that the hooks
    recorded.
    ``listen``: called with what a measured call of the user's returned.
    """

    def __init__(
        self,
        callers: list[nn.Module],
        owner: object,
        *,
        wanted: Callable[[], bool],
        run_hooked: RunHooked,
        gradients: bool,
        listen: Callable[[Any], None],
        report: Report,
    ):
        self._callers, self._listen = callers, listen
        self._owner = owner
        self._wanted = wanted
        self._run_hooked = run_hooked
        self._gradients = gradients
        self._report = report
        self._attachment = Attachment(report)
        self._calls = threading.local()
        self._frames, self.num_measured = (-1, -1), 0
        self.is_settled = True  # whether nothing was compiled in any call of the user's that was measured
        self._lock = threading.Lock()

    def attach(self) -> None:
        """Put one hook before and one after the call of each caller."""
        for caller in self._callers:
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

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._is_users_call():
            stack = self._stack()
            stack.append(None)  # also where nothing is measured: one caller may call another
            if len(stack) == 1:
                stack[0] = self._measure(module, args, kwargs)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._is_users_call() and self._stack():
            second = self._stack().pop()
            if second is not None:
                second.follow(output)
            if not self._stack():
                self._end_of_call(output)

    def _end_of_call(self, output: Any) -> None:
        self.is_settled = self.is_settled and self._frames == _frames_compiled()
        self._listen(output)

    @contextmanager
    def _inside_of(self, second: SecondForward | None) -> Iterator[None]:
        self._stack().append(second)
        try:
            yield
        finally:
            self._stack().pop()

    def _around(self, module: nn.Module, args: Any, kwargs: Any) -> MethodWatch | None:
        if not self._is_users_call():
            return None
        if self._stack():
            return MethodWatch(self._inside_of(None), lambda output: None)
        second = self._measure(module, args, kwargs)

        def done(output: Any) -> None:
            if second is not None:
                second.follow(output)
            self._end_of_call(output)

        return MethodWatch(self._inside_of(second), done)

    def _stack(self) -> list[SecondForward | None]:
        """The calls of callers that this thread is in."""
        stack: list[SecondForward | None] = self._calls.__dict__.setdefault("stack", [])
        return stack

    def _is_users_call(self) -> bool:
        return own_calls.owner is None and not in_recomputation()

    def _measure(self, module: nn.Module, args: Any, kwargs: Any) -> SecondForward | None:
        """Run the forward of a call once more, before the call itself."""
        if not self._wanted():
            return None
        _require_repeatable(module)

        def run() -> Any:
            own_args, own_kwargs = copied_arguments(args, kwargs)
            with user_modes():
                return module(*own_args, **own_kwargs)

        with self._own_run(module):
            output, forward = self._run_hooked(run)
        self._frames, self.num_measured = _frames_compiled(), self.num_measured + 1
        if forward is None or not self._gradients:
            return None
        outputs = list(tensors_in(output))
        # A write through .data is counted nowhere, so that the hooks that may make it are looked for.
        steps = any(_has_foreign_hook(p) for p in all_parameters(module))
        return SecondForward(forward, outputs, partial(self._run_backward, module), self._report, steps)

    def _run_backward(self, module: nn.Module, second: SecondForward) -> None:
        states = second.forward.first_states
        if not states:
            raise CaptureError(
                "the output of the compiled model depends on no residual state with a gradient"
            )

        numbers = list(second.arrived)
        try:
            with self._own_run(module):  # where a checkpoint runs its part of the model once more
                # Retained: the user may run another backward through the same call. It is freed when the step ends.
                backward_to(
                    second.forward,
                    states,
                    [second.outputs[number] for number in numbers],
                    grad_outputs=[second.arrived[number] for number in numbers],
                    retain_graph=True,
                )
        except RuntimeError as error:
            raise _with_advice(error) from None

    @contextmanager
    def _own_run(self, module: nn.Module) -> Iterator[None]:
        """Run the model for ourselves: uncompiled, unseen by other recorders, and with everything as it was afterwards."""
        if not self._lock.acquire(blocking=False):
            raise CaptureError(
                "a compiled model was called by two threads at once; record one thread at a time, or do not compile it"
            )
        try:
            own = own_call(self._owner)
            with preserved_state(module), preserved_attributes(module), eager(), own, without_exchange():
                yield
        finally:
            self._lock.release()


def _frames_compiled() -> tuple[int, int]:
    """How many pieces of code torch's compiler has met, and how many graphs it has made."""
    counters = torch._dynamo.utils.counters
    return counters["frames"]["total"], counters["stats"]["unique_graphs"]


def _has_foreign_hook(parameter: torch.Tensor) -> bool:
    """Whether something of the user's runs when a gradient of a parameter is complete."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return any(type(hook) is not Hook for hook in hooks.values())


def _with_advice(error: RuntimeError) -> Exception:
    """An error of torch's in a backward of ours, with what to do where that is known."""
    if "modified by an inplace operation" in str(error):
        return CaptureError(STEPPED)
    if "use_reentrant" in str(error):
        return CaptureError(
            "gradients of a compiled model cannot be followed through reentrant checkpoints; use use_reentrant=False, which "
            "torch advises for compiled models, or record it without gradients"
        )
    return error


def _require_repeatable(module: nn.Module) -> None:
    """Refuse a model whose forward cannot run once more without any effect."""
    require_no_exchange(module)
    if any(isinstance(p, nn.parameter.UninitializedTensorMixin) for p in module.parameters()):
        raise CaptureError("the model has parameters without a shape yet; call it once before it is measured")


def copied_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of a call's arguments, which a forward of ours may write into: into a batch, or into a cache of past tokens.

    Returns: Without a graph of the user's, in which our backward has nothing to do.
    """
    memo: dict[int, Any] = {}
    # Tensors first: those with a history cannot be copied by `copy`, which takes what it finds in the memo.
    for tensor in tensors_in((args, kwargs)):
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return tuple(_copy(value, memo) for value in args), {n: _copy(v, memo) for n, v in kwargs.items()}


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, IMMUTABLE):
        return value
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        raise CaptureError(
            f"a compiled model is measured by one more forward, and its argument of type {type(value).__name__} cannot be "
            f"copied for it ({type(error).__name__}); record the model without torch.compile"
        ) from None


OF_EXCHANGES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "symm_mem")
"""Namespaces of the operations by which torch's processes exchange tensors."""


def _are_several() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def require_no_exchange(module: nn.Module) -> None:
    """Require that a model has no wrapper or weights that exchange something in each of its forwards.

    Raises CaptureError: Where its weights are spread over processes, or DistributedDataParallel is inside of it.
    """
    if _are_several() and _is_sharded(module):
        raise CaptureError(
            "a compiled model is measured by one more forward, which would gather its sharded weights once more and could "
            "wait for the other processes for ever; record it uncompiled"
        )
    if any(isinstance(part, nn.parallel.DistributedDataParallel) for part in module.modules()):
        raise CaptureError(
            "a compiled model is measured by one more forward, which DistributedDataParallel would count as the user's; "
            "record the module inside of it, or compile that: DistributedDataParallel(torch.compile(model)) can be recorded"
        )


def _is_sharded(module: nn.Module) -> bool:
    wrapped = any(
        hasattr(part, "_get_fsdp_state") or type(part).__name__ == "FullyShardedDataParallel"
        for part in module.modules()
    )
    return wrapped or any(hasattr(parameter, "device_mesh") for parameter in module.parameters())


class _NoExchange(TorchDispatchMode):
    """Raises where something is about to be exchanged with other processes, before it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in OF_EXCHANGES:
            raise CaptureError(
                f"a compiled model is measured by one more forward, in which it would exchange something with other processes "
                f"({func.name()}) and could wait for them for ever; record it uncompiled"
            )
        return func(*args, **(kwargs or {}))


def without_exchange() -> AbstractContextManager[Any]:
    """What forwards and backwards of ours run in among several processes: an exchange raises `CaptureError`."""
    return _NoExchange() if _are_several() else nullcontext()
