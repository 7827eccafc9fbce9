"""A forward of which every operation is recorded, and what is known of the model from the first of them.

Hooks on every module note their calls in the graph of the recorded operations. When the first forward has ended, the
structure of the model is found in it, and the observer gets what was held of the states, so that it is measured like every
later one. Later forwards are recorded alike where an operation alone shows what is to be measured.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from depthscope.probes.connections.proof import StreamConnectionError
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Attachment, MethodWatch
from depthscope.probes.model.layout import LayoutError, require_whole_sequences
from depthscope.probes.model.modules import module_paths, module_types
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.model.user_modes import in_transformation
from depthscope.probes.reading.graph import PARAMETER, Graph, ReadingError, TracedValue
from depthscope.probes.reading.places import KnownPlaces, PlacedRecorder
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.session.attention import AttentionPlaces, placed_attention, watch_attention
from depthscope.probes.session.find_structure import AxisError, RewrittenError, StructureFinder
from depthscope.probes.session.forward import CurrentForward, Forward, own_call
from depthscope.probes.session.observer import Observer
from depthscope.probes.session.step import Step
from depthscope.probes.structure.chain import ChainError
from depthscope.probes.structure.model_structure import require_same

# Why the connections of a later forward are not read; its states and gradients do not depend on them.
NOT_READ = (ReadingError, StreamConnectionError, LayoutError)


class FirstReading:
    """What is known of a model from its first measured forward, and again where modules came or went since.

    ``step``: of the session; its sample begins anew where a first forward counts for nothing.
    """

    def __init__(self, model: nn.Module, step: Step, current: CurrentForward):
        self.model, self._step, self._current = model, step, current
        self.observer: Observer | None = None
        self.attention = AttentionPlaces()
        # Forwards of ours are changed on purpose, as in interventions: each is recorded in full.
        self._places = None if step.scope.only_own else KnownPlaces()
        self._first_batch_axis = 0  # of the model's first tensor, as the first forward assumes it
        self._modules: frozenset[tuple[str, type]] = frozenset()  # of the model, when the observer was made
        self.is_searching = True  # for the structure, since the hooks were put on
        self._paths: dict[int, str] = {}  # of all modules, by identity

    @property
    def batch_axis(self) -> int:
        """The axis of the sequences in the model's first tensor, as far as it is known; 0 where all tokens are of one."""
        if self._step.options.is_packed:
            return 0
        return self._first_batch_axis if self.observer is None else self.observer.structure.batch_axis

    # --- hooks on every module, and a mode around the model's forward ---

    def attach(self, attachment: Attachment) -> None:
        """Put the hooks on: on every module where operations are recorded, and on those that show what is known."""
        # The structure must be as it was.
        observer = self.observer if self._modules == module_types(self.model) else None
        self.is_searching = observer is None
        if observer is None or observer.structure.is_recorded:
            for path, module in module_paths(self.model):
                self._paths[id(module)] = path
                attachment.before(module, self._before_call, computes=False)
                attachment.after(module, self._after_call, computes=False)
            # Around the forward method, not a hook: the mode must be on while it runs, and only then.
            attachment.around(self.model, "forward", self._around_forward)
        if observer is not None:
            observer.attach(attachment)

    def _before_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        forward = self._current.recorded
        if forward is None:
            if in_transformation() and self._current.forward is not None:
                self._current.forward.transformed = True
            return
        if forward.recorder is None and module is self.model:
            forward.recorder = self._new_recorder(forward, args, kwargs)
        if forward.recorder is not None:
            forward.recorder.enter(self._paths[id(module)], module, args, kwargs)

    def _after_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        forward = self._current.recorded
        if forward is not None and forward.recorder is not None:
            forward.recorder.leave(self._paths[id(module)], output)

    def _new_recorder(self, forward: Forward, args: Any, kwargs: Any) -> GraphRecorder | PlacedRecorder:
        """What records the values of a forward that begins."""
        batch = tensors_in((args, kwargs))
        if self.is_searching or self.observer is None:
            require_whole_sequences(self.model)
            first = GraphRecorder(self.model, batch, hooks=1)
            if self._step.options.gradients:
                first.on_taken = partial(self._note_end, forward)
            return first
        # Where it is known where a later forward shows what is measured, no other operation of it is looked at.
        placed = self._places.recorder(self.model, batch) if self._places else None
        recorder = placed or GraphRecorder(self.model, batch, hooks=1)
        recorder.on_taken = partial(self.observer.meet, forward)
        if self.observer.made_by:
            recorder.on_value = partial(self.observer.record_made, forward)
        return recorder

    def _around_forward(self, module: nn.Module, args: Any, kwargs: Any) -> MethodWatch | None:
        forward = self._current.recorded
        # The model may call itself.
        if forward is None or forward.recorder is None or forward.has_begun:
            return None
        forward.has_begun = True
        if self.is_searching:
            watch_attention(forward, self._step.options, self._step.scope)
        return MethodWatch(forward.recorder, forward.recorder.end)

    def _note_end(self, forward: Forward, value: TracedValue, tensor: torch.Tensor) -> None:
        """Note where the graph of a value that is taken, and may be a state, begins: the tensor has it by now."""
        if not value.is_floating or tensor.ndim < 2 or forward.cancelled or forward.recorder is None:
            return
        # Inside of a function of autograd, as a reentrant checkpoint is, it has no graph yet; what the function gives has one.
        # A view of its argument says that it wants a gradient, and has no graph either.
        is_leaf = tensor.is_leaf and not tensor._is_view()
        has_end = tensor.requires_grad and (is_leaf or tensor.grad_fn is not None)
        if has_end and value.number not in forward.ends and value.kind != PARAMETER:
            forward.ends[value.number] = get_gradient_edge(tensor)
            graph = forward.recorder.graph
            graph.has_graph_from[value.number] = len(graph.values)

    # --- the end of a recorded forward ---

    def end_first(self, forward: Forward) -> None:
        """Find the structure in a forward that has ended, and record what that forward showed of it."""
        try:
            recorder, options = forward.recorder, self._step.options
            if not isinstance(recorder, GraphRecorder):
                raise CaptureError("the model's own forward did not run")
            graph, size = recorder.graph, forward.batch_size
            structure = StructureFinder(graph, self.model, options, size, self.batch_axis).structure()
            if self.observer is None:
                # Before the states: where these have to be copied in one more forward, it is not looked for again.
                places = self.attention = placed_attention(forward, recorder, structure)
                if options.selection.requests:
                    options.selection.require_attention(structure.chains, places.heads, places.reasons)
            else:
                require_same(structure, self.observer.structure)
            observer = Observer(self.model, structure, self._step, self._current, self.attention, graph)
            try:
                with own_call(observer):  # what it runs once more is nobody's forward
                    _replay(forward, recorder, observer)
            except RewrittenError:
                self._adopt(observer)  # the structure is right: later forwards copy states as they pass
                if not self._step.num_forwards and self._step.is_empty:
                    self._step.draw_anew()  # nothing of this forward counts, and its sequences come again
                raise
            self._adopt(observer)
        except ChainError as error:
            reason = _out_of_sight(self.model, forward)
            raise ChainError(f"{reason}; {error}") if reason else error from None
        except AxisError:
            self._first_batch_axis = 1
            self._step.draw_anew()  # tokens were drawn, and the next forward is the first one
            raise

    def _adopt(self, observer: Observer) -> None:
        if self._places is not None:
            self._places.forget()
        self.observer, self._modules = observer, module_types(self.model)

    def end_later(self, forward: Forward) -> None:
        """Read the connections whose weights only the operations of a forward show, and where these are in the next one.

        Where they cannot be read, none of them is recorded, and the rest of the forward counts.
        """
        observer, recorder, places = self.observer, forward.recorder, self._places
        assert observer is not None
        assert recorder is not None
        read, graph = observer.structure.read, recorder.graph
        placed = recorder if isinstance(recorder, PlacedRecorder) else None
        try:
            if placed is not None:
                placed.hold()
            if read is not None:
                with own_call(observer):
                    observer.record_read(forward, read.rereading.again(graph))
                graph = read.rereading.graph
            if placed is None and places is not None:
                states = map(graph.at, observer.made_by)
                needed = graph.read | {of.number for of in states if of is not None}
                places.learn(self.model, graph, needed)
        except NOT_READ as error:
            if places is not None:
                places.forget(for_good=placed is not None and placed.error is not None)
            # The sample of a run has connections, which an earlier forward has to give then.
            if not self._step.keeps_rest or (self._step.is_empty and not self._step.reservoir.stored):
                raise
            forward.without_connections = str(error)
        finally:
            recorder.graph.let_go()


def _replay(forward: Forward, recorder: GraphRecorder, observer: Observer) -> None:
    """Hand what was recorded of the first forward to the observer, as the hooks of later forwards do."""
    structure, graph = observer.structure, recorder.graph
    for of in structure.shown:
        value = graph.values[of.point.number]
        state = _held_tensor(graph, value, of.point.path)
        if value.number in forward.ends:
            observer.expect_gradient(forward, of, forward.ends[value.number])
        elif not graph.takers(value):  # as a stream that the head does not take
            observer.hook_unread(forward, of, recorder.living(value))
        observer.record_shown(forward, of, state)
    if structure.read is not None:
        assert structure.read.first is not None
        observer.record_read(forward, structure.read.first)
        structure.read.keep()
        return
    for number, chain in enumerate(structure.chains):
        for position, connection in enumerate(chain.connections):
            if (path := connection.branch_path) is not None:
                output = graph.shown_at(path, connection.branch_index, "output", 0)
                observer.record_branch(forward, number, position, _held_tensor(graph, output, path))


def _held_tensor(graph: Graph, value: TracedValue | None, path: str) -> torch.Tensor:
    if value is None or not graph.is_kept(value):
        raise RewrittenError(
            f"what {path or 'the model'} shows was not kept in the first forward; call the model once more: from the second "
            "forward on states are copied as they pass"
        )
    return graph.tensor(value)


def _out_of_sight(model: nn.Module, forward: Forward) -> str:
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
