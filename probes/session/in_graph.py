"""How is a compiled model measured inside of its own compiled code? At the places that uncompiled forwards showed.

A forward that ran uncompiled shows by which operation of which call each state and each weight of a connection is made. Those
that lie in compiled code are handed out there (`graph_ops`), the others by hooks, so that everything downstream is as of an
uncompiled model. That forward is either one of ours on the same arguments (`compiled_calls`), or, where a second forward
would exchange something with other processes, each compiled part runs once more by itself when its turn comes, between the
hooks that gather its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode, _push_mode

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Report, call_safely, in_recomputation, in_reentrant_checkpoint, without_frames
from depthscope.probes.model.preserved_state import preserved_attributes, preserved_state
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.reading.graph import FILLS, OUTPUT, PARAMETER, Graph, TracedValue
from depthscope.probes.reading.places import (
    OTHER,
    KnownPlaces,
    OperationPlaces,
    PlacedRecorder,
    circumstances,
)
from depthscope.probes.session.compiled_regions import CompiledGraph, Passages, Region, Wanted
from depthscope.probes.session.forced_eager import eager
from depthscope.probes.session.forward import CurrentForward, Forward, own_call, own_calls
from depthscope.probes.session.gradient_hooks import GradientListener
from depthscope.probes.session.graph_ops import RunningCall
from depthscope.probes.session.graph_places import CallInRegion, PlaceInRegion
from depthscope.probes.session.observer import Observer
from depthscope.probes.session.own_forwards import without_exchange
from depthscope.probes.structure.model_structure import CapturedState, Structure
from depthscope.probes.structure.tape import Tape, value_at

RANDOM = (
    "a compiled part draws random numbers, as for dropout, and its weights are sharded over processes: its places cannot be "
    "proven from one uncompiled part at a time; record it with dropout 0, or uncompiled"
)
CHECKPOINTED = (
    "a compiled part runs inside of an activation checkpoint that is not compiled with it; put the checkpoint inside of what is "
    "compiled, or record it uncompiled"
)


@dataclass(frozen=True)
class Target:
    """A value that is handed out, and what it is."""

    value: TracedValue
    state: CapturedState | None = None
    branch: tuple[int, int] | None = None  # chain, and position of its connection
    is_read: bool = False  # whether weights of connections are computed from it


@dataclass
class Part:
    """One call of a region in each forward."""

    wanted: Wanted
    targets: list[Target]
    parameters: list[tuple[TracedValue, str]] = field(default_factory=list)  # that are read, by their names


@dataclass
class Plan:
    """Where everything that is measured is made.

    ``outside``: what is made in no compiled part; None where no operation has to be looked at.
    ``parts``: by region and the number of its call.
    ``points``: of states that hooks outside of compiled parts show.
    """

    graph: Graph
    outside: OperationPlaces | None
    parts: Mapping[tuple[str, int], Part]
    points: tuple[CapturedState, ...]

    @property
    def num_read(self) -> set[int]:
        """Numbers of the values that compiled parts have to hand out for the connections."""
        targets = {t.value.number for part in self.parts.values() for t in part.targets if t.is_read}
        return targets | {value.number for part in self.parts.values() for value, _ in part.parameters}


class Planner:
    """Divides the values of a forward that was read among compiled parts and what is around them.

    Parameters
    ----------
    graph : Graph
        Of the forward.
    structure : Structure
        What it showed.
    regions : sequence of Region
        The compiled parts.
    own : mapping
        By region and the number of its call which of the call's operations its forward ran, where hooks around it ran others.
    """

    def __init__(
        self,
        graph: Graph,
        structure: Structure,
        regions: Sequence[Region],
        own: Mapping[tuple[str, int], tuple[int, int]],
    ):
        self._graph, self._structure, self._own = graph, structure, own
        self._region_of = [self._around(number, regions) for number in range(len(graph.calls))]
        self._calls = self._calls_in_regions()

    def _around(self, number: int, regions: Sequence[Region]) -> tuple[Region, int] | None:
        """The region around a call, and the number of the region's own call."""
        path = self._graph.calls[number].path
        region = next((region for region in regions if region.contains(path)), None)
        if region is None:
            return None
        while self._graph.calls[number].path != region.path:
            number = self._graph.calls[number].parent
            if number < 0:
                return None
        return region, number

    def _calls_in_regions(self) -> list[CallInRegion | None]:
        """Each call as the compiler's graph names it: by the path from the region on, and its number there."""
        counts: dict[tuple[int, str], int] = {}
        found: list[CallInRegion | None] = []
        for number, around in enumerate(self._region_of):
            if around is None:
                found.append(None)
                continue
            region, root = around
            path = region.inner(self._graph.calls[number].path)
            count = counts.get((root, path), 0)
            counts[root, path] = count + 1
            found.append(CallInRegion(path, count))
        return found

    def plan(self, needed: Collection[int]) -> Plan:
        """The plan of a forward.

        ``needed``: numbers of the values by which the connections are read.
        Raises CaptureError: Where one of them is made in a way that compiled code does not show.
        """
        targets: dict[int, Target] = {}
        points: list[CapturedState] = []
        for state in self._structure.captured:
            value = value_at(self._graph, state.point)
            if value is None:
                raise CaptureError(f"{state.point.path or 'the model'} did not show its state")
            point = self._seen_outside(state, value)
            if point is not None:
                points.append(point)
            else:
                targets[value.number] = Target(value, state)
        for target in self._branches():
            known = targets.get(target.value.number, target)
            targets[target.value.number] = replace(known, branch=target.branch)
        outside = OperationPlaces(self._graph, self._graph.circumstances) if needed else None
        parameters: dict[tuple[str, int], list[tuple[TracedValue, str]]] = {}
        for number in sorted(needed):
            value = self._graph.values[number]
            around = self._region_of[value.call] if value.call >= 0 else None
            if around is not None and value.made_at is not None:
                targets[number] = replace(targets.get(number, Target(value)), is_read=True)
            elif around is not None and value.kind == PARAMETER:
                name = self._graph.parameter_names.get(number, "")
                region, root = around
                if not name or not region.contains(name.rpartition(".")[0]):
                    raise CaptureError(f"a weight of the connections, {name or 'without a name'}, lies outside")
                parameters.setdefault(self._key(region, root), []).append((value, region.inner(name)))
            elif outside is not None:
                self._add_outside(outside, value)
        return Plan(self._graph, outside, self._parts(targets, parameters), tuple(points))

    def _key(self, region: Region, root: int) -> tuple[str, int]:
        return region.path, self._graph.calls[root].number

    def _seen_outside(self, state: CapturedState, value: TracedValue) -> CapturedState | None:
        """A state with a point by which a hook sees it; None where compiled code makes and shows it."""
        point = state.point
        if point.at == "operation":
            return state if value.call < 0 or self._region_of[value.call] is None else None
        for shown in self._graph.shown.get(value.number, ()):
            around, call = self._region_of[shown.call], self._graph.calls[shown.call]
            if around is None or around[1] == shown.call:
                new = replace(point, at=shown.at, path=call.path, index=call.number, item=shown.item)
                same = (point.at, point.path, point.index, point.item)
                is_same = (new.at, new.path, new.index, new.item) == same
                inside = self._region_of[self._graph.call_of(point.path, point.index)]
                if is_same or (inside is not None and inside[0].path != point.path):
                    return state._replace(point=new)
        return None

    def _branches(self) -> Iterator[Target]:
        """What branches give inside of compiled parts."""
        for number, chain in enumerate(self._structure.chains):
            for position, connection in enumerate(chain.connections):
                if connection.branch_path is None or self._structure.read is not None:
                    continue
                given = self._graph.shown_at(
                    connection.branch_path, connection.branch_index, "output", 0
                )
                call = self._graph.call_of(connection.branch_path, connection.branch_index)
                if given is not None and self._region_of[call] is not None and given.made_at is not None:
                    yield Target(given, branch=(number, position))

    def _add_outside(self, places: OperationPlaces, value: TracedValue) -> None:
        if value.made_at is not None:
            places.wanted.setdefault(value.call, {}).setdefault(value.made_at, []).append(value)
        elif value.given_at is not None:
            places.given[value.given_at] = value
        elif value.held is not None and (value.kind == PARAMETER or value.name in FILLS):
            places.constant.append((value, value.held))
        else:
            raise CaptureError(f"a value of {self._graph.path(value) or 'the model'} is made by no operation")

    def _parts(
        self,
        targets: Mapping[int, Target],
        parameters: Mapping[tuple[str, int], list[tuple[TracedValue, str]]],
    ) -> dict[tuple[str, int], Part]:
        grouped: dict[tuple[str, int], list[Target]] = {key: [] for key in parameters}
        for number in sorted(targets):
            around = self._region_of[targets[number].value.call]
            if around is None or targets[number].value.made_at is None:
                where = self._graph.path(targets[number].value) or "the model"
                raise CaptureError(f"a state in {where} is made by no operation that compiled code shows")
            grouped.setdefault(self._key(*around), []).append(targets[number])
        parts = {}
        for key, of in grouped.items():
            places, operations = [], {}
            for target in of:
                call = self._calls[target.value.call]
                assert call is not None and target.value.made_at is not None
                ran = self._graph.operations.get(target.value.call, [])
                is_forward = not call.path and call.number == 0
                start, end = self._own.get(key, (0, len(ran))) if is_forward else (0, len(ran))
                made_at = target.value.made_at
                places.append(
                    PlaceInRegion(call, made_at if made_at == OUTPUT else made_at - start, target.value.item)
                )
                operations[call] = tuple(ran[start:end])
            wanted = Wanted(tuple(places), tuple(operations.items()))
            parts[key] = Part(wanted, of, parameters.get(key, []))
        return parts


class PartsRecorder(PlacedRecorder):
    """The values of a later forward by which the connections are read, of compiled parts and of what is around them."""

    def __init__(self, plan: Plan, batch: Sequence[torch.Tensor]):
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
    """What a session has on a model whose parts are compiled.

    Parameters
    ----------
    model : Module
        The session's model.
    regions : list of Region
        Its compiled parts.
    current : CurrentForward
        The running forward.
    owner : object
        Stands for the session.
    report : callable
        Called with every exception of ours.
    """

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
        self._passages = Passages(regions, self._is_measured, self._run, self._unseen)
        self.plan: Plan | None = None
        self.failed = ""  # why compiled code cannot be measured
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

    def _unseen(self) -> AbstractContextManager[Any]:
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
        ready = call_safely(self._report, self._prepared, region, part, forward, tape)
        if ready is None:
            return self._plain(region, args, kwargs)
        graph, call = ready
        with self._unseen():
            output = graph.run(region, args, kwargs, call.open())
        if graph.error:
            self._fail(
                f"what is measured of {region.path or 'the model'} was not found in its compiled code: {graph.error}"
            )
        return self._plain(region, args, kwargs) if output is None and graph.error else output

    def _prepared(
        self, region: Region, part: Part, forward: Forward, tape: Tape | None
    ) -> tuple[CompiledGraph, RunningCall]:
        """The graph of a call that is measured, and what is done with what it hands out."""
        self._take_parameters(region, part, tape)
        graph = self._graph_of(region, part.wanted)
        receivers = [
            partial(self._receive, target, forward, tape, partial(graph.listens_at, place))
            for place, target in enumerate(part.targets)
        ]
        call = RunningCall(receivers, self._report)
        forward.handles.append(call)  # type: ignore[arg-type]  # it has `remove`
        return graph, call

    def _graph_of(self, region: Region, wanted: Wanted | None) -> CompiledGraph:
        for kind, graph in self._graphs:
            if kind is type(region.module) and graph.wanted == wanted and graph.is_for(region.context):
                return graph
        self._graphs.append((type(region.module), CompiledGraph(region.context, wanted)))
        return self._graphs[-1][1]

    def _plain(self, region: Region, args: Any, kwargs: Any) -> Any:
        with self._unseen():
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
            if has_gradient():
                shown = stand_in(copy)
            if tape is not None and isinstance(tape.recorder, PartsRecorder):
                tape.recorder.take(target.value, copy)
                if tape.logits is not None:
                    tape.logits.take(target.value, copy if shown is None else shown)
        if target.state is not None:
            _, depth, _ = target.state
            observer.record_state(forward, target.state.chain, depth, value)
            if observer.options.gradients and has_gradient():
                listened = stand_in() if shown is None else shown
                observer.hook_gradient(forward, target.state.chain, depth, listened)
        if target.branch is not None:
            observer.record_branch(forward, *target.branch, value)

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
            n for n in range(len(recorder.graph.calls) - 1, -1, -1) if recorder.graph.calls[n].path == region.path
        )
        ran = recorder.graph.operations.setdefault(call, [])
        random = _random_states()
        with _outside_of(recorder), ExitStack() as stack:
            for mode in (preserved_state(region.module), preserved_attributes(region.module), eager()):
                stack.enter_context(mode)
            stack.enter_context(own_call(self._owner))
            stack.enter_context(without_exchange())
            start = len(ran)
            with _under(recorder):
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
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            once = once.narrow(axis, 0, 1)
    own = torch.empty_strided(once.shape, once.stride(), dtype=once.dtype, device=once.device)
    return own.copy_(once).expand(tensor.shape)


def _random_states() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return states + (torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])


@contextmanager
def _under(recorder: Any) -> Iterator[None]:
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
