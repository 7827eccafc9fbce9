"""A probe that is on: it reads a model's residual states in the forwards and backwards that the user runs.

A `Session` tapes the first measured forward through hooks on every module and finds the structure of the model in it; from
then on only the modules that show a state, a branch or a connection have hooks. It never runs the model itself, and no hook
returns anything. Each thread has its own current forward.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from depthscope.probes.model.errors import CaptureError, as_capture_error
from depthscope.probes.model.hooks import (
    Attachment,
    in_pipeline_inference,
    in_recomputation,
    num_running_calls,
)
from depthscope.probes.model.modules import PresentModules, named_arguments
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.model.user_modes import in_transformation, readable
from depthscope.probes.session.attention import add_attention_sums
from depthscope.probes.session.compiled_model import CompiledCalls, compiled_callers
from depthscope.probes.session.find_structure import RewrittenError
from depthscope.probes.session.first_forward import FirstReading
from depthscope.probes.session.forward import CurrentForward, Forward, Measured, own_call, own_calls
from depthscope.probes.session.model_call import call_model
from depthscope.probes.session.observer import Observer
from depthscope.probes.session.options import Options, Scope
from depthscope.probes.session.step import Step, StepLoss, weights_stamp
from depthscope.probes.structure.model_structure import Structure

T = TypeVar("T")

MOST_ERRORS = 8  # of one step, whose first one is what is said


class Session:
    """The hooks of one probe on one model, and the forwards that they saw.

    ``model``: the user's model, which no hook changes.
    ``loss_scale``: gives the factor by which the loss is multiplied at present; None for 1.
    ``scope``: how much of a forward is measured.
    ``called``: the module that the user calls, where that is another one around the model, as of data parallelism.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        loss_scale: Callable[[], torch.Tensor | None] | None = None,
        scope: Scope = Scope(),  # noqa: B008  it is frozen
        called: nn.Module | None = None,
    ):
        self._called = model if called is None else called
        self.model, self.options = model, options
        self.owner = object()  # and not the session itself, which its own hooks would then keep alive
        # Of hooks, which must not raise in the user's forward or backward: raised at the end of a step.
        self.errors: list[Exception] = []
        self.skipped = 0  # forwards of other threads during the first forward
        self.step = Step(options, scope, StepLoss(loss_scale, self.report))
        self._current = CurrentForward(self.owner)
        self._compiled_calls: CompiledCalls | None = None  # of a step that is measured by forwards of ours
        self.first = FirstReading(model, self.step, self._current)
        self._running: weakref.WeakSet[Forward] = weakref.WeakSet()  # in all threads
        self._lock = threading.RLock()  # guards all of the above against forwards of other threads
        self._attachment: Attachment | None = None
        self._present: PresentModules | None = None  # since the hooks were put on

    @property
    def observer(self) -> Observer:
        """What records the forwards; it knows the structure, and the precision of the states."""
        if self.first.observer is None:
            raise CaptureError("the structure of the model is unknown before its first forward; call it")
        return self.first.observer

    @property
    def structure(self) -> Structure:
        """What the model was found to be in its first forward."""
        return self.observer.structure

    # --- hooks on, hooks off ---

    def attach(self) -> None:
        """Put the hooks on: on every module until the structure is known, then on those that show it.

        A compiled model gets none of these: see `compiled_model`.
        """
        self.detach()
        self.step.begin()
        # Forwards of ours run uncompiled.
        callers = [] if self.step.scope.only_own else compiled_callers(self.model, self._called)
        with self._lock:
            if not callers:
                self._attach()
            else:
                calls = CompiledCalls(callers, self.owner, self.step, self._counts, self._call_hooked)
                self._compiled_calls = calls

    @contextmanager
    def on(self) -> Iterator[None]:
        """The hooks are on inside of the block, and what is not folded in it is forgotten."""
        self.attach()
        try:
            yield
        finally:
            self.detach()
            self.drop()

    def call(self, batch: Any) -> Any:
        """The output of the model for one batch, in a call of ours with the hooks on."""
        # Where it is asked from what coefficients were computed, the graph shows whether they learn.
        has_graph = self.options.gradients or self.step.scope.origins is not None
        with torch.set_grad_enabled(has_graph):
            return self._observed(lambda: call_model(self.model, batch))

    def _observed(self, function: Callable[[], T]) -> T:
        """What a function of ours returns that calls the model.

        It is called once more where the first forward found the structure, but lost the value of a state that was rewritten
        in place: the second forward copies states as they pass.
        """
        with own_call(self.owner):
            result = function()
            # Other errors would come again.
            if any(isinstance(error, RewrittenError) for error in self.errors):
                self.errors.clear()
                with self._lock:
                    self._attach()
                result = function()
            return result

    def _call_hooked(self, function: Callable[[], T]) -> tuple[T, Forward | None]:
        """What a function returns, and the forward in it: that of ours of a compiled model, which has no hooks otherwise."""
        before = self.step.last
        try:
            with self._lock:
                self._attach()
            result = self._observed(function)
        finally:
            with self._lock:
                self._remove_hooks()
        return result, self.step.last if self.step.last is not before else None

    def _attach(self) -> None:
        self._remove_hooks()
        attachment = self._attachment = Attachment(self.report)
        # The model's own pre-hook goes first and its hook last, since the model itself may be a module that shows a state.
        attachment.before(self.model, self._begin)
        self._present = PresentModules(self.model)
        self.first.attach(attachment)
        attachment.after(self.model, self._end)
        # After `_end`, and also where the user's forward raised: what began has left, whether it ended well or not.
        attachment.after(self.model, self._leave, always=True)

    def detach(self) -> int:
        """Take every hook off; gradient hooks stay on the tensors of ended forwards, until these are folded or dropped.

        Returns: How many forwards had not ended, and are forgotten.
        """
        # One that was stopped, as by a key, did not leave; those of other threads are taken to run.
        if self._current.recorded is not None and not num_running_calls(self.model):
            self._current.clear()
        with self._lock:
            self._remove_hooks()
            if self._compiled_calls is not None:
                self._compiled_calls.remove()
                self._compiled_calls = None
            cut_short = [of for of in self._running if not (of.cancelled or of.ending)]
            for forward in cut_short:
                forward.cancel()
                self._running.discard(forward)
        self._current.clear()
        return len(cut_short)

    def _remove_hooks(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    def after_fork(self) -> None:
        """Forget the probe in a child process, which is a copy of the parent in the middle of anything."""
        self._lock = threading.RLock()  # a thread that does not exist here may hold the old one
        self.detach()
        self.drop()

    def report(self, error: Exception) -> None:
        """Note what a hook met; the first error of a step is enough to leave the step out."""
        if len(self.errors) < MOST_ERRORS:
            self.errors.append(error)

    # --- one forward ---

    def _counts(self, module: nn.Module) -> bool:
        """Whether a call that begins is measured; it is no part of a step that will be left out."""
        with self._lock:
            return not self.errors and self.step.counts(module)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = self._current
        is_other = self.step.scope.only_own and own_calls.owner is not self.owner
        if is_other or current.foreign or in_recomputation():
            return
        if current.recorded is not None and num_running_calls(self.model) > 1:
            current.recorded.nested += 1  # the model calls itself: part of the forward that is running
            return
        is_running = current.forward is not None and not current.forward.cancelled
        if (is_running and in_transformation()) or in_pipeline_inference():
            return  # part of it as well, whose tensors nobody can read; or no part of the training
        current.clear()
        if not self._counts(module):
            return
        tensors = [tensor for tensor in tensors_in((args, kwargs)) if tensor.ndim > 0]
        if tensors and not sum(tensor.numel() for tensor in tensors):
            return  # an empty batch adds nothing, and shows no structure
        lead = readable(tensors[0] if tensors else None)
        named = named_arguments(module, args, kwargs)
        with self._lock:
            if self._attachment is None:
                return
            if self.first.is_searching and any(not forward.cancelled for forward in self._running):
                self.skipped += 1  # the hooks are replaced at the end of that one
                return
            assert self._present is not None
            self._present.require_same()
            self._attachment.run_last()
            forward = current.forward = self._new_forward(module, lead, named)
            self._running.add(forward)

    def _new_forward(self, model: nn.Module, lead: torch.Tensor, named: dict[str, Any]) -> Forward:
        reservoir, stamp = self.step.reservoir, (weights_stamp(model), self.step.trains)
        if self.step.is_empty and not self._running and reservoir.stored_stamp != reservoir.stamp:
            reservoir.stamp = None  # the sequences that were chosen so far came to nothing
        if self.step.scope.digests:
            self.step.note_batch(lead)
        lead = lead.unsqueeze(0) if self.options.is_packed else lead
        return reservoir.new_forward(lead, self.first.batch_axis, stamp, named)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        forward = self._current.recorded
        if forward is None or forward.nested:
            return
        self._current.forward, forward.ending = None, True
        is_complete = False
        try:
            if not self.errors:  # else something of it, or of another forward of the step, is missing
                self._complete(forward, output)
                is_complete = True
        finally:
            with self._lock:
                self._running.discard(forward)
                if is_complete:
                    self.step.add(forward)
                else:
                    forward.release()

    def _complete(self, forward: Forward, output: Any) -> None:
        """Record what only a forward that has ended shows."""
        assert self._present is not None
        self._present.require_same()
        if self.first.is_searching:
            try:
                self.first.end_first(forward)
            finally:
                with self._lock:
                    if self.step.scope.only_own:  # they are put on again before another call
                        self._remove_hooks()
                    elif self._attachment is not None:
                        self._attach()  # with the hooks of the structure, or for another first forward
        elif forward.recorder is not None:
            self.first.end_later(forward)
        if self.step.scope.sums:
            add_attention_sums(forward, max(self.first.attention.heads.values(), default=0))
        self.step.loss.listen(output)
        for sums in forward.sums:
            sums.end_forward()
        forward.end()
        self.observer.require_complete(forward)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Note that a call of the model is over; where it did not reach `_end`, it raised."""
        forward = self._current.recorded
        if forward is None:
            return
        if forward.nested:
            forward.nested -= 1
            return
        self._running.discard(forward)
        self._current.clear()

    # --- the end of a step ---

    def raise_first_error(self) -> None:
        """Raise the first error that a hook met, and forget the others: most follow from it."""
        errors, self.errors[:] = list(self.errors), []
        if errors:
            raise as_capture_error(errors[0])

    def fold(self) -> list[Measured]:
        """What the forwards since the last fold add up to, as `Step.fold` says it."""
        with self._lock:
            for forward in self.step.forwards:
                for state in list(forward.stream_gradients):
                    self.observer.complete_gradient(forward, *state)
            return self.step.fold()

    @property
    def pending(self) -> bool:
        """Whether forwards ended, or errors came, since the last fold."""
        return bool(self.errors) or not self.step.is_empty

    def drop(self) -> None:
        """Forget the forwards since the last fold, and the one that this thread is running."""
        self._current.clear()
        self.step.drop()
        self.errors.clear()
        self.step.loss.clear()
