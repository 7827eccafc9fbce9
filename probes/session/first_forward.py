"""A forward of which every operation is recorded, and the structure of the model found in it.

Hooks on every module note their calls in the graph of the recorded operations. When the first forward has ended, `replay`
hands the observer what was held of the states, so that it is measured like every later one. Later forwards are recorded
alike where an operation alone shows what is to be measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.proof import DepthWeights, StreamConnectionError
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Attachment, MethodWatch, Report, in_recomputation
from depthscope.probes.model.layout import LayoutError
from depthscope.probes.model.modules import module_paths, module_types
from depthscope.probes.model.tensors import floats_in, tensors_in
from depthscope.probes.reading.description import MemoryReading
from depthscope.probes.reading.graph import PARAMETER, Graph, ReadingError, TracedValue, ValuePlace
from depthscope.probes.reading.places import KnownPlaces, PlacedRecorder
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.session.attention import (
    AttentionPlaces,
    later_attention,
    placed_attention,
    watch_attention,
)
from depthscope.probes.session.find_structure import AxisError, RewrittenError, StructureFinder
from depthscope.probes.session.forward import (
    CurrentForward,
    Forward,
    GradientListener,
    Key,
    Tape,
    own_call,
)
from depthscope.probes.session.observer import ConnectionParameters, Observer
from depthscope.probes.session.options import Options, Scope
from depthscope.probes.session.step import Step
from depthscope.probes.structure.chain import ChainError
from depthscope.probes.structure.model_structure import ShownTensor, Structure, require_same

# Why the connections of a later forward are not read; its states and gradients do not depend on them.
NOT_READ = (ReadingError, StreamConnectionError, LayoutError)


class RecordedForward:
    """Hooks on every module, and a mode around the model's forward, that record its operations.

    ``observer``: of a known structure that only operations show: it gets the states that no module shows.
    ``known``: where a later forward shows what is measured: then no other operation of it is looked at.
    ``attention``: of how many of the sampled sequences it is looked at what their tokens attend to; None where it is not
    looked for.
    """

    def __init__(
        self,
        model: nn.Module,
        current: CurrentForward,
        *,
        gradients: bool,
        report: Report,
        observer: Observer | None = None,
        known: KnownPlaces | None = None,
        attention: int | None = None,
    ):
        self._observer, self._known, self._attention = observer, known, attention
        self._operations: dict[ValuePlace, list[ShownTensor]] = {}
        for state in observer.structure.shown if observer is not None else ():
            if state.point.at == "operation":
                self._operations.setdefault(state.point.place, []).append(state)
        self._model = model
        self._paths: dict[int, str] = {}  # of all modules, by identity
        self._current = current
        self._gradients = gradients
        self._report = report

    def attach(self, attachment: Attachment) -> None:
        """Put hooks on every module."""
        for path, module in module_paths(self._model):
            self._paths[id(module)] = path
            attachment.before(module, self._before_call, computes=False)
            attachment.after(module, self._after_call, computes=False)
            if module is self._model:
                # Around the forward method, not a hook: the mode must be on while it runs, and only then.
                attachment.around(module, "forward", self._around_forward)

    def _before_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        tape = self._current.taped
        if tape is None:
            self._current.note_transformation()
            return
        if tape.recorder is None and module is self._model:
            tape.recorder = self._new_recorder(tape, args, kwargs)
        if tape.recorder is not None:
            tape.recorder.enter(self._paths[id(module)], module, args, kwargs)

    def _after_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tape = self._current.taped
        if tape is not None and tape.recorder is not None:
            tape.recorder.leave(self._paths[id(module)], output)

    def _new_recorder(self, tape: Tape, args: Any, kwargs: Any) -> GraphRecorder | PlacedRecorder:
        """What records the values of a forward that begins."""
        batch = list(tensors_in((args, kwargs)))
        placed = None if self._known is None else self._known.recorder(self._model, batch)
        recorder = placed or GraphRecorder(self._model, batch, hooks=1)
        forward = self._current.recorded
        assert forward is not None
        if self._observer is not None or self._gradients:
            recorder.on_taken = partial(self._meet, forward, tape)
        if self._operations:
            recorder.on_value = partial(self._record_operation, forward, tape)
        return recorder

    def _around_forward(self, module: nn.Module, args: Any, kwargs: Any) -> MethodWatch | None:
        tape, forward = self._current.taped, self._current.recorded
        # The model may call itself.
        if tape is None or tape.recorder is None or forward is None or tape.is_on:
            return None
        recorder, tape.is_on = tape.recorder, True
        if self._attention is not None and isinstance(recorder, GraphRecorder):
            rows = forward.rows[: self._attention]
            tape.attention = watch_attention(recorder, forward, rows)
        return MethodWatch(recorder, recorder.end)

    def _meet(self, forward: Forward, tape: Tape, value: TracedValue, tensor: torch.Tensor) -> None:
        """Note a value that is taken: the tensor has its graph by now."""
        if not value.is_floating or tensor.ndim < 2 or forward.cancelled:
            return
        if value.number not in tape.met:
            tape.met.add(value.number)
            states = self._record_operation(forward, tape, value, tensor)
            if self._observer is not None:
                for state in states:
                    self._observer.hook_gradient(forward, state, tensor)
        if self._observer is None:  # otherwise it knows which values are states
            self._listen(forward, tape, value, tensor)

    def _listen(self, forward: Forward, tape: Tape, value: TracedValue, tensor: torch.Tensor) -> None:
        """Listen to the gradient of a value that may be a state."""
        # Inside of a function of autograd, as a reentrant checkpoint is, it has no graph yet; what the function gives has one.
        # A view of its argument says that it wants a gradient, and has no graph either.
        is_leaf = tensor.is_leaf and not tensor._is_view()
        listens = self._gradients and tensor.requires_grad and (is_leaf or tensor.grad_fn is not None)
        if listens and value.number not in forward.listeners and value.kind != PARAMETER:
            forward.listeners[value.number] = GradientListener(tensor, self._report)
            tape.graph.has_graph_from[value.number] = len(tape.graph.values)

    def _record_operation(
        self, forward: Forward, tape: Tape, value: TracedValue, tensor: torch.Tensor
    ) -> Sequence[ShownTensor]:
        """Record what is shown of states when the operation that makes it has run, or a part of it was written."""
        if not self._operations or tape.recorder is None or self._observer is None:
            return ()
        states = self._operations.get(tape.recorder.graph.place(value), ())
        for state in states:
            known = state.stream in forward.streams.get((state.chain, state.depth), ())
            if not known and ("state", state.chain, state.depth) not in forward.fired:
                self._observer.record_shown(forward, state, tensor)
        return states


# --- what a recorded forward showed ---


def replay(tape: Tape, forward: Forward, observer: Observer) -> None:
    """Hand what was recorded of the first forward to the observer, as the hooks of later forwards do.

    Raises RewrittenError: Where the tensor of a state was not held.
    """
    structure, graph = observer.structure, tape.graph
    for state in structure.shown:
        kept = _held_tensor(graph, graph.values[state.point.number], state.point.path)
        _expect_gradient(tape, forward, observer, state, graph.values[state.point.number])
        observer.record_shown(forward, state, kept)
    if structure.read is not None:
        assert structure.read.first is not None
        _record_read(tape, forward, observer, structure.read.first)
        structure.read.keep()
        return
    for number, chain in enumerate(structure.chains):
        for position, connection in enumerate(chain.connections):
            if connection.branch_path is not None:
                output = graph.shown_at(connection.branch_path, connection.branch_index, "output", 0)
                observer.record_branch(
                    forward, number, position, _held_tensor(graph, output, connection.branch_path)
                )


def _expect_gradient(
    tape: Tape, forward: Forward, observer: Observer, of: ShownTensor, value: TracedValue
) -> None:
    listener = forward.listeners.get(value.number)
    if listener is not None:
        # The value has a hook since it was met; from now on the hook knows which state it belongs to.
        observer.expect_gradient(forward, of, listener)
    elif not tape.graph.takers(value):  # as a stream that the head does not take
        tensor = tape.recorder.living(value) if isinstance(tape.recorder, GraphRecorder) else None
        if tensor is not None:
            observer.hook_gradient(forward, of, tensor)
        else:
            observer.unread.add(of.key)


def _held_tensor(graph: Graph, value: TracedValue | None, path: str) -> torch.Tensor:
    if value is None or not graph.is_kept(value):
        raise RewrittenError(
            f"what {path or 'the model'} shows was not kept in the first forward; call the model once more: from the second "
            "forward on states are copied as they pass"
        )
    return graph.tensor(value)


def record_operations(
    tape: Tape, forward: Forward, observer: Observer, model: nn.Module, known: KnownPlaces | None
) -> None:
    """Read the connections whose weights only the operations of a forward show, and where these are in the next one.

    ``tape``: of a later forward.
    Raises ReadingError, StreamConnectionError, LayoutError: Where they cannot be read; none of them is recorded then.
    """
    read, graph = observer.structure.read, tape.graph
    try:
        if isinstance(tape.recorder, PlacedRecorder):
            tape.recorder.hold()
        if read is not None:
            _record_read(tape, forward, observer, read.rereading.again(graph))
            graph = read.rereading.graph
        if known is not None and not isinstance(tape.recorder, PlacedRecorder):
            points = (of.point for of in observer.structure.shown)
            states = (graph.at(point.place) for point in points if point.at == "operation")
            known.learn(model, graph, graph.read | {of.number for of in states if of is not None})
    except NOT_READ:
        if known is not None:
            known.forget(
                for_good=isinstance(tape.recorder, PlacedRecorder) and tape.recorder.error is not None
            )
        raise
    finally:
        graph.let_go()


def _record_read(tape: Tape, forward: Forward, observer: Observer, memory: MemoryReading) -> None:
    """Record the coefficients of one forward, by the reading of its memory."""
    structure = observer.structure
    assert structure.read is not None
    for number, weights in enumerate(structure.read.weights(memory, forward.batch_size)):
        if isinstance(weights, DepthWeights):
            if len(forward.rows):
                forward.parts[0, number] = weights.sampled(forward.rows.cpu())
            forward.fired.add(("branch", 0, number))
            continue
        observer.record_connection(forward, number, weights)
    if observer.scope.origins is not None and observer.origins is None and structure.num_streams > 1:
        observer.origins = observer.scope.origins(structure.read, memory, forward, observer)


def out_of_sight(model: nn.Module, forward: Forward) -> str:
    """Why the parts of a model ran where no hook sees them; empty where they did not."""
    if forward.transformed:
        return (
            "modules of the model ran inside of a transformation of torch.func (vmap, grad, …), whose tensors stand for "
            "others and are not read"
        )
    if isinstance(model, torch.jit.ScriptModule):
        return "the model is TorchScript, whose parts run outside of Python: capture the module that it was made from"
    if isinstance(model, torch.fx.GraphModule) and not any(True for _ in model.children()):
        return "the model is a graph of operations, as torch.export makes: capture the module that it was made from"
    return ""


class LaterForwards:
    """Hooks on the modules that show a known structure.

    ``observer``: records what passes; it knows the structure.
    ``ended``: gives the forwards that ended, whose checkpoints a backward recomputes.
    ``attention``: which calls attend.
    """

    def __init__(
        self,
        model: nn.Module,
        observer: Observer,
        current: CurrentForward,
        ended: Callable[[], list[Forward]],
        attention: AttentionPlaces,
    ):
        self._model = model
        self._observer = observer
        self._structure = observer.structure
        self._current = current
        self._ended = ended
        self._attention = attention

    def attach(self, attachment: Attachment) -> None:
        """Put the hooks on; those of one module run in this order, so its input is read before it may rewrite it."""
        modules = dict(self._model.named_modules(remove_duplicate=False))  # a shared block has several paths
        inputs, outputs = self._states_seen_at("input"), self._states_seen_at("output")
        for path, states in inputs.items():
            attachment.before(modules[path], partial(self._record_states, "input", path, states))
        for path in sorted(self._attention.paths):
            attachment.around(modules[path], "forward", partial(self._watch_attention, path))
        branches = {
            c.branch_path for chain in self._structure.chains for c in chain.connections if c.branch_path
        }
        for path in branches:
            attachment.after(modules[path], partial(self._after_branch, path))
        for path, states in outputs.items():
            attachment.after(modules[path], partial(self._record_states, "output", path, states))

    def _states_seen_at(self, side: str) -> dict[str, list[ShownTensor]]:
        """The states that the inputs or the outputs of calls show, by module path."""
        found: dict[str, list[ShownTensor]] = {}
        for state in self._structure.shown:
            if state.point.at == side:
                found.setdefault(state.point.path, []).append(state)
        return found

    # --- states ---

    def _record_states(
        self, side: str, path: str, states: Sequence[ShownTensor], module: nn.Module, *given: Any
    ) -> None:
        """Record the states that one call shows: those whose turn it is, where a module is called several times.

        ``given``: the arguments of the call and its keywords, then what it returned where it has ended.
        """
        tensors = floats_in(*(given[2:] or given))
        if not tensors or self._current.foreign:
            return
        if in_recomputation():
            self._hook_recomputed(states, tensors)
            return
        forward = self._current.recorded
        if forward is None:
            return
        # Counted by side: a module may have a hook on one of them only.
        index = forward.next_index(side, path)
        for state in states:
            if state.point.index == index and state.point.item < len(tensors):
                self._observer.record_shown(forward, state, tensors[state.point.item])
                self._observer.hook_gradient(forward, state, tensors[state.point.item])

    def _hook_recomputed(self, states: Sequence[ShownTensor], tensors: list[torch.Tensor]) -> None:
        """Hook the gradients of states that a checkpoint recomputes.

        A reentrant checkpoint runs its forward without a graph: only the tensors of the recomputation have gradients. A
        non-reentrant one has hooks from the forward already, and `hook_gradient` adds none. The index of a call is
        unknown here, since checkpoints are recomputed from the last to the first, so a module that shows several states
        by several calls is left out.
        """
        if len({state.point.item for state in states}) != len(states):
            return
        ended = self._ended()
        for state in states:
            item = state.point.item
            if item < len(tensors) and tensors[item].requires_grad:
                waiting = [forward for forward in ended if state.key not in forward.expected_gradients]
                if len(waiting) > 1:
                    raise CaptureError(
                        "a reentrant checkpoint was recomputed when several forwards waited for their gradients, which "
                        "cannot be distinguished; run each backward before the next forward, or use use_reentrant=False"
                    )
                for forward in waiting:
                    self._observer.hook_gradient(forward, state, tensors[item])

    # --- attention ---

    def _watch_attention(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> MethodWatch | None:
        forward = self._current.recorded
        if forward is None:
            return None
        found = later_attention(self._attention, forward, path)
        return None if found is None else MethodWatch(*found)

    # --- branches ---

    def _after_branch(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        forward, tensor = self._current.recorded, next(iter(floats_in(output)), None)
        if forward is None or tensor is None:
            return
        call = path, forward.next_index("branch", path)
        for number, chain in enumerate(self._structure.chains):
            for position, connection in enumerate(chain.connections):
                if (connection.branch_path, connection.branch_index) == call:
                    self._observer.record_branch(forward, number, position, tensor)


class FirstReading:
    """What is known of a model from its first measured forward, and again where modules came or went since.

    ``scope``: how much of a forward is measured.
    ``step``: of the session; its sample begins anew where a first forward counts for nothing.
    ``loss_scale``: gives the factor by which the loss is multiplied at present; None for 1.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        scope: Scope,
        step: Step,
        loss_scale: Callable[[], torch.Tensor | None] | None,
        report: Report,
    ):
        self.model, self.options, self.scope = model, options, scope
        self._step, self._loss_scale, self._report = step, loss_scale, report
        self.observer: Observer | None = None
        self.attention = AttentionPlaces()
        # Forwards of ours are changed on purpose, as in interventions: each is recorded in full.
        self.places = None if scope.only_own else KnownPlaces()
        self._first_batch_axis = 0  # of the model's first tensor, as the first forward assumes it
        self._modules: frozenset[tuple[str, type]] = frozenset()  # of the model, when the observer was made

    @property
    def is_needed(self) -> bool:
        """Whether the next forward is a first one."""
        return (
            self.observer is None
            or self._modules != module_types(self.model)  # the structure must be as it was
        )

    @property
    def is_recorded(self) -> bool:
        """Whether every measured forward is traced, since nothing else shows the weights of the connections."""
        return self.observer is not None and self.observer.structure.is_recorded

    @property
    def batch_axis(self) -> int:
        """The axis of the sequences in the model's first tensor, as far as it is known."""
        return self._first_batch_axis if self.observer is None else self.observer.structure.batch_axis

    @property
    def first_attention(self) -> int | None:
        """Of how many sequences a forward looks at what they attend to; None where it is not looked for.

        A loop does so where the site is named: it costs more than the rest of a measured step.
        """
        selection = self.options.selection
        if not selection.includes("attention") or not (self.scope.only_own or selection.requests):
            return None
        return self.options.max_sequences if self.scope.sums else 0  # only where it lies

    def end(self, tape: Tape, forward: Forward) -> None:
        """Find the structure in a forward that has ended, and record what that forward showed of it."""
        try:
            if tape.recorder is None:
                raise CaptureError("the model's own forward did not run")
            size, axis = forward.batch_size, forward.batch_axis
            structure = StructureFinder(tape.graph, self.model, self.options, size, axis).structure()
            if self.observer is not None:
                require_same(structure, self.observer.structure)
            # Before the states: where these have to be copied in one more forward, it is not traced again.
            self._place_attention(tape, forward, structure)
            observer = self._new_observer(structure, tape)
            try:
                with own_call(observer):  # what it runs once more is nobody's forward
                    replay(tape, forward, observer)
            except RewrittenError:
                self._adopt(observer)  # the structure is right: later forwards copy states as they pass
                if not self._step.num_forwards and self._step.is_empty:
                    self._step.draw_anew()  # nothing of this forward counts, and its sequences come again
                raise
            self._adopt(observer)
        except ChainError as error:
            reason = out_of_sight(self.model, forward)
            raise ChainError(f"{reason}; {error}") if reason else error from None
        except AxisError:
            self._first_batch_axis = 1
            self._step.draw_anew()  # tokens were drawn, and the next forward is the first one
            raise

    def _place_attention(self, tape: Tape, forward: Forward, structure: Structure) -> None:
        """Find out where the model attends, and how much of it is looked at from now on."""
        if self.observer is not None:
            return  # known already
        self.attention = placed_attention(tape, forward, structure)
        selection = self.options.selection
        if selection.requests:
            selection.require_attention(structure.chains, self.attention.heads, self.attention.reasons)

    def _new_observer(self, structure: Structure, tape: Tape) -> Observer:
        parameters, times = None, dict[Key, float]()
        for of in structure.shown:  # a state of several streams is there with the last of them
            key, moment = (of.chain, of.depth), of.point.moment_in(tape.graph)
            times[key] = max(moment, times.get(key, -math.inf))
        # Of a capture's one set of weights no value moves.
        if self.scope.sums and not self.scope.only_own and structure.connections:
            parameters = ConnectionParameters(self.model, structure)
        return Observer(
            structure,
            self.options,
            self._report,
            self._loss_scale,
            self.scope,
            calls=Counter(call.path for call in tape.graph.calls),
            times=times,
            parameters=parameters,
        )

    def _adopt(self, observer: Observer) -> None:
        if self.places is not None:
            self.places.forget()
        self.observer, self._modules = observer, module_types(self.model)
