"""How is a compiled model measured inside of its own compiled code? At the places that uncompiled forwards showed.

A forward that ran uncompiled shows by which operation of which call each state and each weight of a connection is made. Those
that lie in compiled code are handed out there (`graph_ops`), the others by hooks, so that everything downstream is as of an
uncompiled model. That forward is either one of ours on the same arguments (`compiled_calls`), or, where a second forward
would exchange something with other processes, each compiled part runs once more by itself when its turn comes, between the
hooks that gather its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode, _push_mode

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import (
    Report,
    call_safely,
    in_recomputation,
    in_reentrant_checkpoint,
    without_frames,
)
from depthscope.probes.model.preserved_state import preserved_attributes, preserved_state
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.model.user_modes import circumstances
from depthscope.probes.model.while_needed import eager
from depthscope.probes.reading.graph import Graph, TracedValue
from depthscope.probes.reading.places import OTHER, KnownPlaces, PlacedRecorder
from depthscope.probes.session.compiled_calls import without_exchange
from depthscope.probes.session.compiled_plan import CompiledPlan, Part, Planner, Target
from depthscope.probes.session.compiled_regions import CompiledGraph, Passages, Region, Wanted
from depthscope.probes.session.forward import CurrentForward, Forward, Tape, own_call, own_calls
from depthscope.probes.session.gradient_hooks import GradientListener
from depthscope.probes.session.graph_ops import RunningCall
from depthscope.probes.session.observer import Observer

MOST_COMPILED = 4  # how often one graph is; from some number on torch runs the code uncompiled
RANDOM = (
    "a compiled part draws random numbers, as for dropout, and its weights are sharded over processes: its places cannot be "
    "proven from one uncompiled part at a time; record it with dropout 0, or uncompiled"
)
CHECKPOINTED = (
    "a compiled part runs inside of an activation checkpoint that is not compiled with it; record it without the checkpoint, "
    "or uncompiled"
)


class PartsRecorder(PlacedRecorder):
    """The values of a later forward by which the connections are read, of compiled parts and of what is around them."""

    def __init__(self, plan: CompiledPlan, batch: Sequence[torch.Tensor]):
        assert plan.outside is not None
        super().__init__(plan.outside, batch)
        self._inside = plan.num_read

    def take(self, value: TracedValue, tensor: torch.Tensor) -> None:
        """Take a value that a compiled part handed out."""
        self._found[value.number] = tensor

    def end(self, output: Any) -> Graph:
        """The graph, which has the tensors of this forward."""
        if not self._inside <= self._found.keys():
            self._stop("")
        return super().end(output)


class InGraph(KnownPlaces):
    """What a session has on a model whose parts are compiled."""

    def __init__(
        self,
        model: nn.Module,
        regions: list[Region],
        current: CurrentForward,
        owner: object,
        report: Report,
    ):
        super().__init__()
        self.model, self.regions = model, regions
        self._current, self._owner, self._report = current, owner, report
        self._graphs: list[tuple[type[nn.Module], CompiledGraph]] = []
        self._passages = Passages(regions, self._is_measured, self._run, self._without_our_modes)
        self.plan: CompiledPlan | None = None
        self.failed = ""  # why compiled code cannot be measured
        self._fails_next = ""  # the same from the next step on
        self.observer: Observer | None = None
        self.is_open = False
        self.reads = False  # whether a forward of the step was read part by part
        self._own: dict[tuple[str, int], tuple[int, int]] = {}  # as `Planner` takes it
        # Of the forward that is read part by part: what a part gave uncompiled, by what it gave compiled.
        self._uncompiled: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    # --- as the places of an uncompiled model ---

    def recorder(self, model: nn.Module, batch: Sequence[torch.Tensor]) -> PlacedRecorder | None:
        """A recorder for a forward that begins; None for one that is read."""
        if self.plan is None or not self.is_open:
            return None
        if self.plan.outside is None or circumstances(model, batch) != self.plan.graph.circumstances:
            self.forget()
            raise CaptureError(OTHER.format("the model"))
        return PartsRecorder(self.plan, batch)

    def learn(self, model: nn.Module, graph: Graph, needed: Collection[int]) -> None:
        """Find the places of what was needed of a forward that was recorded in full."""
        assert self.observer is not None
        try:
            self.plan = Planner(graph, self.observer.structure, self.regions, self._own).plan(needed)
        except CaptureError as error:
            self.failed = str(error)

    def forget(self) -> None:
        """Read forwards anew."""
        self.plan = self.places = None

    def hides(self, path: str) -> bool:
        """Whether a module runs inside of compiled code, where no hook is."""
        return self.plan is not None and any(region.is_above(path) for region in self.regions)

    # --- measured steps ---

    def open(self) -> None:
        """Lead calls of compiled parts here."""
        self._passages.open()
        self.is_open, self.reads = True, False
        self.places = None if self.plan is None else self.plan.outside

    def close(self) -> None:
        """Let them run as the user compiled them."""
        self._passages.close()
        self.failed = self.failed or self._fails_next
        self.is_open, self.places = False, None
        self._uncompiled.clear()

    def _is_measured(self) -> bool:
        """Whether a call of compiled code that begins is measured, where no forward of the model has begun yet."""
        if in_recomputation() or own_calls.owner is not None or not self.is_open:
            return False
        if in_reentrant_checkpoint() or torch._C._autograd._top_saved_tensors_default_hooks(True):
            self._fail(CHECKPOINTED)
            return False
        return not self.failed

    def _without_our_modes(self) -> AbstractContextManager[Any]:
        tape = self._current.tape
        return _outside_of(None if tape is None else tape.recorder)

    def _fail(self, reason: str) -> None:
        self.failed = reason
        self._report(CaptureError(reason))

    def _run(self, region: Region, args: Any, kwargs: Any) -> Any:
        """Run a compiled part in the place of the user's graph."""
        forward, tape = self._current.recorded, self._current.taped
        if forward is None:
            return self._plain(region, args, kwargs)
        if self.plan is None:
            return self._read(region, tape, args, kwargs)
        part = self.plan.parts.get((region.path, forward.next_index("compiled", region.path)))
        if part is None:
            return self._plain(region, args, kwargs)
        ready = call_safely(self._report, self._graph_and_call, region, part, forward, tape)
        if ready is None:
            return self._plain(region, args, kwargs)
        graph, call = ready
        with self._without_our_modes():
            output = graph.run(region, args, kwargs, call.open())
        if graph.num_compiled > MOST_COMPILED:
            self._fails_next = f"{region.path or 'the model'} is compiled anew again and again"
        if graph.error:
            self._fail(
                f"what is measured of {region.path or 'the model'} was not found in its compiled code: {graph.error}"
            )
        return self._plain(region, args, kwargs) if output is None and graph.error else output

    def _graph_and_call(
        self, region: Region, part: Part, forward: Forward, tape: Tape | None
    ) -> tuple[CompiledGraph, RunningCall]:
        """The graph of a call that is measured, and what is done with what it hands out."""
        self._take_parameters(region, part, tape)
        graph = self._graph_of(region, part.wanted)
        receivers = [
            partial(self._receive, target, forward, tape, partial(graph.listened.__contains__, place))
            for place, target in enumerate(part.targets)
        ]
        call = RunningCall(receivers, self._report, graph.listened)
        forward.calls.append(call)
        return graph, call

    def _graph_of(self, region: Region, wanted: Wanted | None) -> CompiledGraph:
        for kind, graph in self._graphs:
            if kind is type(region.module) and graph.wanted == wanted and graph.is_for(region.context):
                return graph
        self._graphs.append((type(region.module), CompiledGraph(region.context, wanted)))
        return self._graphs[-1][1]

    def _plain(self, region: Region, args: Any, kwargs: Any) -> Any:
        with self._without_our_modes():
            return self._graph_of(region, None).run(region, args, kwargs, torch.tensor([-1]))

    def _take_parameters(self, region: Region, part: Part, tape: Tape | None) -> None:
        """Copy the weights of connections now, where sharded ones are gathered."""
        if tape is not None and isinstance(tape.recorder, PartsRecorder):
            for value, name in part.parameters:
                tensor = region.module.get_parameter(name)
                tape.recorder.take(value, tensor.detach().clone())

    def _receive(
        self,
        target: Target,
        forward: Forward,
        tape: Tape | None,
        has_gradient: Callable[[], bool],
        value: torch.Tensor,
        stand_in: Any,
    ) -> None:
        """Record what compiled code handed out."""
        observer = self.observer
        assert observer is not None
        if forward.cancelled:
            return
        shown: torch.Tensor | None = None
        if target.is_read:
            copy = value.clone()
            shown = stand_in(copy) if has_gradient() else None
            self._hand_on(target.value, copy, shown, tape)
        for state in target.states:
            observer.record_shown(forward, state, value)
            if observer.options.gradients and has_gradient():
                observer.hook_gradient(forward, state, stand_in() if shown is None else shown)
        if target.branch is not None:
            observer.record_branch(forward, *target.branch, value)

    @staticmethod
    def _hand_on(
        value: TracedValue, copy: torch.Tensor, shown: torch.Tensor | None, tape: Tape | None
    ) -> None:
        """Let the reading have a value; ``shown``: what stands for it in autograd's graph."""
        if tape is not None and isinstance(tape.recorder, PartsRecorder):
            tape.recorder.take(value, copy)
            if tape.logits is not None:
                tape.logits.take(value, copy if shown is None else shown)

    # --- one part at a time, uncompiled ---

    def _read(self, region: Region, tape: Tape | None, args: Any, kwargs: Any) -> Any:
        """Run a part uncompiled where it is recorded, and compiled for the user."""
        recorder = None if tape is None else tape.recorder
        own, self.reads = None, True
        if recorder is not None:
            try:
                own = self._once(region, recorder, args, kwargs)
            except CaptureError as error:
                self._fail(str(error))
            except Exception as error:
                self._report(without_frames(error))
        output = self._plain(region, args, kwargs)
        if own is not None:
            call_safely(self._report, self._join, recorder, own, output)
        return output

    def _once(self, region: Region, recorder: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
        """Run a part as it is written, on copies of what it was called with; what it gave."""
        given: dict[int, torch.Tensor] = {}

        def own(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                known = self._uncompiled.get(id(value))
                if known is not None:
                    return known[1]
                if id(value) not in given:
                    with _outside_of(recorder):
                        copy = _copy(value).requires_grad_(value.requires_grad)
                    given[id(value)] = copy
                    recorder.enter_value(copy, recorder.value_of(value))
                return given[id(value)]
            if isinstance(value, (tuple, list)):
                return type(value)(own(item) for item in value)
            return {n: own(v) for n, v in value.items()} if type(value) is dict else value

        own_args, own_kwargs = own(tuple(args)), own(dict(kwargs))
        call = next(
            n
            for n in range(len(recorder.graph.calls) - 1, -1, -1)
            if recorder.graph.calls[n].path == region.path
        )
        ran = recorder.graph.operations.setdefault(call, [])
        random = _random_states()
        with _outside_of(recorder), ExitStack() as stack:
            for mode in (preserved_state(region.module), preserved_attributes(region.module), eager()):
                stack.enter_context(mode)
            stack.enter_context(own_call(self._owner))
            stack.enter_context(without_exchange())
            start = len(ran)
            with _with_mode(recorder):
                output = type(region.module).forward(region.module, *own_args, **own_kwargs)
            self._own[region.path, recorder.graph.calls[call].number] = start, len(ran)
            if not all(map(torch.equal, random, _random_states())):
                raise CaptureError(RANDOM)
        return list(tensors_in(output))

    def _join(self, recorder: Any, own: list[torch.Tensor], output: Any) -> None:
        """Let what a part gave the user be the values that it gave uncompiled."""
        theirs, forward = list(tensors_in(output)), self._current.recorded
        if [t.shape for t in theirs] != [t.shape for t in own]:
            raise CaptureError("a compiled part gave other tensors than its forward as it is written")
        for tensor, uncompiled in zip(theirs, own, strict=True):
            value = recorder.known(uncompiled)
            recorder.enter_value(tensor, value)
            listener = None if forward is None else forward.listeners.get(value.number)
            if forward is not None and listener is not None and tensor.grad_fn is not None:
                listener.release()  # of what no backward goes through
                forward.listeners[value.number] = GradientListener(tensor, self._report)
            detached = uncompiled.detach().requires_grad_(tensor.requires_grad)
            recorder.enter_value(detached, value)
            self._uncompiled[id(tensor)] = tensor, detached


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that lies in memory in the same way, which decides which operations run on it."""
    once = tensor.detach()
    if type(tensor) not in (torch.Tensor, nn.Parameter):  # such as one that is spread over processes
        return once.clone()
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            once = once.narrow(axis, 0, 1)
    own = torch.empty_strided(once.shape, once.stride(), dtype=once.dtype, device=once.device)
    return own.copy_(once).expand(tensor.shape)


def _random_states() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return states + (torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])


@contextmanager
def _with_mode(recorder: Any) -> Iterator[None]:
    _push_mode(recorder)
    try:
        yield
    finally:
        _pop_mode()


@contextmanager
def _outside_of(recorder: Any) -> Iterator[None]:
    """Run what a recorder of operations is not to see: code that is compiled already, and copies of ours."""
    is_on = recorder is not None and _get_current_dispatch_mode() is recorder
    if is_on:
        _pop_mode()
    try:
        yield
    finally:
        if is_on:
            _push_mode(recorder)
