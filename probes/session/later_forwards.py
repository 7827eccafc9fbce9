"""Every forward after the first: hooks only on modules that show a state, a branch or a connection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.computed_values import ComputedValues
from depthscope.probes.connections.detection import paired_family
from depthscope.probes.connections.families import BY_NAME
from depthscope.probes.connections.family import ForwardFamily, PairedFamily
from depthscope.probes.connections.reading import Opening, branch_output, returned_watch
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Attachment, MethodWatch, Modes, in_recomputation
from depthscope.probes.model.tensors import first_float, floats_in, tensors_in
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.session.attention import AttentionPlaces, later_attention
from depthscope.probes.session.forward import CurrentForward, Forward
from depthscope.probes.session.observer import Observer
from depthscope.probes.structure.model_structure import CapturedState
from depthscope.probes.structure.tape import FORWARD


class LaterForwards:
    """Hooks on the modules that show a known structure.

    Parameters
    ----------
    model : Module
        The user's model.
    observer : Observer
        Records what passes; it knows the structure.
    current : CurrentForward
        The running forward.
    ended : callable
        Gives the forwards that ended, whose checkpoints a backward recomputes.
    attention : AttentionPlaces, optional
        Which calls attend, where that is looked at.
    """

    def __init__(
        self,
        model: nn.Module,
        observer: Observer,
        current: CurrentForward,
        ended: Callable[[], list[Forward]],
        attention: AttentionPlaces | None = None,
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
        for (path, method), states in inputs.items():
            if method == FORWARD:
                attachment.before(modules[path], partial(self._before_call, path, states))
        self._attach_attention(attachment, modules)
        connections = [(c.path, BY_NAME[c.style]) for c in self._structure.connections]
        returned = {path for path, family in connections if isinstance(family, ForwardFamily)}
        for path in returned:
            # Around the forward method, not a hook: the watch must be on while it runs.
            attachment.around(modules[path], FORWARD, partial(self._around_returned, path))
        paired = {path for path, family in connections if isinstance(family, PairedFamily)}
        methods = {path for path, method in (*inputs, *outputs) if method != FORWARD}
        # A state may be the output of a closing method, so those methods are wrapped for the states' sake too.
        for path in paired | methods:
            pair = paired_family(modules[path])
            assert pair is not None
            opened, closed = inputs.get((path, pair.opens), []), outputs.get((path, pair.closes), [])
            attachment.around(
                modules[path], pair.opens, partial(self._around_opening, path, pair.opens, opened)
            )
            attachment.around(
                modules[path], pair.closes, partial(self._around_closing, path, pair.closes, closed)
            )
        branches = {
            c.branch_path for chain in self._structure.chains for c in chain.connections if c.branch_path
        }
        for path in branches:
            attachment.after(modules[path], partial(self._after_branch, path))
        for (path, method), states in outputs.items():
            if method == FORWARD:
                attachment.after(modules[path], partial(self._after_call, path, states))

    def _attach_attention(self, attachment: Attachment, modules: Mapping[str, nn.Module]) -> None:
        for path in () if self._attention is None else sorted(self._attention.paths):
            attachment.around(modules[path], FORWARD, partial(self._around_attention, path))

    def _states_seen_at(self, side: str) -> dict[tuple[str, str], list[CapturedState]]:
        """The states that the inputs or the outputs of calls show, by module path and method."""
        found: dict[tuple[str, str], list[CapturedState]] = {}
        for state in self._structure.captured:
            if state.point.at == side:
                found.setdefault((state.point.path, state.point.method), []).append(state)
        return found

    # --- states ---

    def _before_call(
        self, path: str, states: Sequence[CapturedState], module: nn.Module, args: Any, kwargs: Any
    ) -> None:
        self._record_states("input", path, FORWARD, states, floats_in(args, kwargs))

    def _after_call(
        self,
        path: str,
        states: Sequence[CapturedState],
        module: nn.Module,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> None:
        self._record_states("output", path, FORWARD, states, floats_in(output))

    def _record_states(
        self,
        side: str,
        path: str,
        method: str,
        states: Sequence[CapturedState],
        tensors: list[torch.Tensor],
    ) -> None:
        """Record the states that one call shows: those whose turn it is, where a module is called several times."""
        if not tensors or self._current.foreign:
            return
        if in_recomputation():
            self._hook_recomputed(states, tensors)
            return
        forward = self._current.recorded
        if forward is None:
            return
        # Counted by side and method: a module may have a hook on one of them only.
        index = forward.next_index(f"{side} {method}", path)
        for number, depth, point in states:
            if point.index == index and point.item < len(tensors):
                self._observer.record_state(forward, number, depth, tensors[point.item])
                self._observer.hook_gradient(forward, number, depth, tensors[point.item])

    def _hook_recomputed(self, states: Sequence[CapturedState], tensors: list[torch.Tensor]) -> None:
        """Hook the gradients of states that a checkpoint recomputes.

        A reentrant checkpoint runs its forward without a graph: only the tensors of the recomputation have gradients. A
        non-reentrant one has hooks from the forward already, and `hook_gradient` adds none. The index of a call is
        unknown here, since checkpoints are recomputed from the last to the first, so a module that shows several states
        by several calls is left out.
        """
        if len({state.point.item for state in states}) != len(states):
            return
        ended = self._ended()
        for number, depth, point in states:
            if point.item < len(tensors) and tensors[point.item].requires_grad:
                waiting = [forward for forward in ended if (number, depth) not in forward.expected_gradients]
                if len(waiting) > 1:
                    raise CaptureError(
                        "a reentrant checkpoint was recomputed when several forwards waited for their gradients, which "
                        "cannot be told apart; run each backward before the next forward, or use use_reentrant=False"
                    )
                for forward in waiting:
                    self._observer.hook_gradient(forward, number, depth, tensors[point.item])

    # --- connections ---

    def _around_returned(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> MethodWatch | None:
        """Watch a connection that returns its weights for those that it does not return, such as H_pre."""
        begun = self._begin_connection(path, first_float(args, kwargs))
        if begun is None:
            return None
        forward, number, x = begun
        watch = returned_watch(x, self._structure.sites[number])
        record = partial(self._observer.record_returned, forward, number, x.detach())
        # The watch sees the user's own call, hence all sequences at once.
        recorded = _Recorded(self._observer, path, number, module, (args, kwargs))
        return recorded.around(
            watch, lambda output: record(output, lambda rows: watch.floating(), recorded.ended(output))
        )

    def _around_opening(
        self,
        path: str,
        method: str,
        states: Sequence[CapturedState],
        module: nn.Module,
        args: Any,
        kwargs: Any,
    ) -> MethodWatch | None:
        self._record_states("input", path, method, states, floats_in(args, kwargs))
        begun = self._begin_connection(path, first_float(args, kwargs))
        if begun is None:
            return None
        forward, number, x = begun
        site, place = self._structure.sites[number], self._observer.place(number)
        opening = Opening(site, forward.batch_size, x.detach(), key=number, place=place)
        forward.openings.setdefault(path, []).append(opening)
        watch = opening.watch()
        recorded = _Recorded(self._observer, path, number, module, (args, kwargs))

        def done(result: Any) -> None:
            opening.read(result, watch)
            mix = None if opening.parts is None else opening.parts.mix
            self._observer.record_logits(forward, number, mix, recorded.ended(result))

        return recorded.around(watch, done)

    def _around_closing(
        self,
        path: str,
        method: str,
        states: Sequence[CapturedState],
        module: nn.Module,
        args: Any,
        kwargs: Any,
    ) -> MethodWatch | None:
        forward = self._current.recorded

        def record_states(result: Any) -> None:
            self._record_states("output", path, method, states, floats_in(result))

        if forward is None or not forward.openings.get(path):
            # Also in a recomputation, where the states of a reentrant checkpoint get their gradient hooks.
            return MethodWatch(nullcontext(), record_states)
        opening, branch_out = forward.openings[path].pop(), branch_output(module, args, kwargs)
        watch = opening.closing_watch(branch_out)

        def done(result: Any) -> None:
            record_states(result)
            parts = opening.close(branch_out, result, watch)
            self._observer.record_connection(forward, opening.key, parts)

        return MethodWatch(watch or nullcontext(), done)

    def _begin_connection(
        self, path: str, x: torch.Tensor | None
    ) -> tuple[Forward, int, torch.Tensor] | None:
        """The running forward, the number of the connection that is called, and its streams; None where none is recorded."""
        forward = self._current.recorded
        if forward is None or x is None:
            return None
        call = path, forward.next_index("connection", path)
        numbers = [n for n, c in enumerate(self._structure.connections) if (c.path, c.index) == call]
        return (forward, numbers[0], x) if numbers else None

    def _around_attention(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> MethodWatch | None:
        forward = self._current.recorded
        if forward is None or self._attention is None:
            return None
        found = later_attention(self._attention, forward, path, module)
        return None if found is None else MethodWatch(*found)

    # --- branches ---

    def _after_branch(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        forward, tensor = self._current.recorded, first_float(output)
        if forward is None or tensor is None:
            return
        call = path, forward.next_index("branch", path)
        for number, chain in enumerate(self._structure.chains):
            for position, connection in enumerate(chain.connections):
                if (connection.branch_path, connection.branch_index) == call:
                    self._observer.record_branch(forward, number, position, tensor)


class _Recorded:
    """The operations of one call of a connection, for the logits of its matrix; of none whose logits are not there."""

    def __init__(self, observer: Observer, path: str, number: int, module: nn.Module, given: Any):
        self._recorder: GraphRecorder | None = None
        if observer.looks_for_logits(number):
            recorder = self._recorder = GraphRecorder(module, list(tensors_in(given)), holds=False)
            recorder.enter(path, type(module).__name__)
            self._seen = observer.matrices(recorder.graph)
            recorder.on_taken = self._seen.take

    def around(self, watch: AbstractContextManager[Any], done: Callable[[Any], None]) -> MethodWatch:
        """The call, watched and recorded."""
        if self._recorder is None:
            return MethodWatch(watch, done)
        return MethodWatch(Modes(watch, self._recorder), done)

    def ended(self, result: Any) -> ComputedValues | None:
        """The matrices of the call, which gave a result."""
        if self._recorder is None:
            return None
        self._recorder.end(result)
        return self._seen
