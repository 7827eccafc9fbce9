"""Every forward after the first: hooks only on modules that show a state, a branch or a connection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Attachment, MethodWatch, in_recomputation
from depthscope.probes.model.tensors import first_float, floats_in
from depthscope.probes.session.attention import AttentionPlaces, later_attention
from depthscope.probes.session.forward import CurrentForward, Forward
from depthscope.probes.session.observer import Observer
from depthscope.probes.structure.model_structure import ShownTensor


class LaterForwards:
    """Hooks on the modules that show a known structure.

    ``observer``: records what passes; it knows the structure.
    ``ended``: gives the forwards that ended, whose checkpoints a backward recomputes.
    ``attention``: which calls attend, where that is looked at.
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
        for path, states in inputs.items():
            attachment.before(modules[path], partial(self._record_states, "input", path, states))
        for path in () if self._attention is None else sorted(self._attention.paths):
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
