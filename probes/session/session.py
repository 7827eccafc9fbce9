"""A probe that is on: it reads a model's residual states in the forwards and backwards that the user runs.

A `Session` tapes the first measured forward through hooks on every module and finds the structure of the model in it; from
then on only the modules that show a state, a branch or a connection have hooks. It never runs the model itself, and no hook
returns anything. Each thread has its own current forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from depthscope.probes.model.arguments import is_decoding, named_arguments
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Attachment, in_recomputation
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.session.first_forward import (
    AxisError,
    FirstForward,
    RewrittenError,
    find_structure,
    replay,
)
from depthscope.probes.session.forward import CurrentForward, Forward, Measured
from depthscope.probes.session.later_forwards import LaterForwards
from depthscope.probes.session.observer import Observer
from depthscope.probes.session.options import Options
from depthscope.probes.session.reservoir import Reservoir, weights_stamp
from depthscope.probes.structure.branch_sums import find_branch_sums
from depthscope.probes.structure.find_chains import block_paths
from depthscope.probes.structure.model_structure import FINAL, Structure
from depthscope.probes.structure.tape import Tape


class Session:
    """The hooks of one probe on one model, and the forwards that they saw.

    Parameters
    ----------
    model : Module
        The user's model, which no hook changes.
    options : Options
        What to capture.
    loss_scale : callable, optional
        Gives the factor by which the loss is multiplied at present; None for 1.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        loss_scale: Callable[[], torch.Tensor | None] | None = None,
    ):
        self.model = model
        self.options = options
        # Of hooks, which must not raise in the user's forward or backward: raised at the end of a step.
        self.errors: list[Exception] = []
        self.forwards: list[Forward] = []  # that ended since the last fold
        self.last: Forward | None = None
        self.num_forwards = 0
        self.skipped = 0  # forwards of other threads during the first forward
        self.reservoir = Reservoir(options.max_sequences, options.seed)
        self._loss_scale = loss_scale
        self._observer: Observer | None = None  # from the end of the first forward on
        self._first_batch_axis = 0  # of the model's first tensor, as the first forward assumes it
        self._measured: list[Measured] = []
        self._current = CurrentForward()
        self._lock = threading.RLock()  # guards all of the above against forwards of other threads
        self._first_thread: int | None = None  # that runs the first forward
        self._attachment: Attachment | None = None

    @property
    def observer(self) -> Observer:
        """What records the forwards; it knows the structure, and the precision of the states."""
        if self._observer is None:
            raise CaptureError(
                "the structure of the model is unknown before its first forward; call the model"
            )
        return self._observer

    @property
    def structure(self) -> Structure:
        """What the model was found to be in its first forward."""
        return self.observer.structure

    # --- hooks on, hooks off ---

    def attach(self) -> None:
        """Put the hooks on: on every module until the structure is known, then on those that show it."""
        self.detach()
        attachment = self._attachment = Attachment(self.errors.append)
        # The model's own pre-hook goes first and its hook last, since the model itself may be a module that shows a state.
        attachment.before(self.model, self._begin)
        if self._observer is None:
            first = FirstForward(
                self.model, self._current, gradients=self.options.gradients, report=self.errors.append
            )
            first.attach(attachment)
        else:
            later = LaterForwards(self.model, self._observer, self._current, self._last_forward)
            later.attach(attachment)
        attachment.after(self.model, self._end)

    def detach(self) -> None:
        """Take every hook off; gradient hooks stay on the tensors of running graphs, until these are freed."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
        self._current.clear()
        self._first_thread = None

    def _last_forward(self) -> Forward | None:
        """The last forward since the fold, to which a running backward belongs."""
        return self.forwards[-1] if self.forwards else None

    # --- one forward ---

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_recomputation() or self._current.paused:
            return
        self._current.clear()  # a forward that raised never reached `_end`
        named = named_arguments(module, args, kwargs)
        lead = next((t for t in tensors_in((args, kwargs)) if t.ndim > 0), None)
        if lead is None:
            raise CaptureError("the model was called without a tensor; expected a batch of tensors")
        with self._lock:
            unknown = self._observer is None
            if unknown and self._first_thread not in (None, threading.get_ident()):
                self.skipped += 1  # one tape at a time: the hooks on every module are about to be replaced
                return
            if unknown:
                self._first_thread = threading.get_ident()
            stamp = weights_stamp(module)
            batch_axis = self._first_batch_axis if unknown else self.structure.batch_axis
            batch_size = lead.shape[batch_axis]
            slots = self.reservoir.choose(batch_size, stamp)
            first_index = self.reservoir.total - batch_size
        rows = torch.tensor(sorted(slots), dtype=torch.long, device=lead.device)
        self._current.forward = Forward(
            batch_size=batch_size,
            batch_axis=batch_axis,
            stamp=stamp,
            first_index=first_index,
            slots=slots,
            arguments=named,
            decoding=is_decoding(named),
            rows=rows,
            lead_shape=tuple(lead.shape),
            row_data=lead.detach().movedim(batch_axis, 0)[rows].clone(),
        )
        if unknown:
            blocks = self.options.blocks
            # The search for the sums inside of blocks needs the tensors of every call in them: only where it is requested.
            search = find_branch_sums if self.options.selection.inside_blocks else None
            self._current.tape = Tape(keep=block_paths(module, blocks) if blocks else (), on_block=search)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        forward, self._current.forward = self._current.forward, None
        tape, self._current.tape = self._current.tape, None
        if forward is None or in_recomputation():
            return
        if tape is not None:
            try:
                self._end_first(tape, forward)
            except Exception:
                forward.release()
                raise
            finally:
                self.attach()  # with the hooks that the structure needs, or for another first forward
        for sums in forward.sums:
            sums.end_forward()
        forward.end()
        with self._lock:
            self.forwards.append(forward)
            self.last = forward
            if not self.options.gradients:
                self._absorb()  # no backward will add to it, so a loop that never steps stores one forward at most

    def _end_first(self, tape: Tape, forward: Forward) -> None:
        """Find the structure in the first forward, and record what that forward showed of it."""
        try:
            structure = find_structure(tape, forward, self.model, self.options)
        except AxisError:
            self._first_batch_axis = 1
            self.reservoir = Reservoir(self.options.max_sequences, self.options.seed)  # tokens were drawn
            raise
        observer = Observer(structure, self.options, self.errors.append, self._loss_scale)
        try:
            with self._current.pause():
                replay(tape, forward, observer)
        except RewrittenError:
            self._observer = observer  # the structure is right: later forwards copy states as they pass
            raise
        self._observer = observer

    # --- the end of a step ---

    def raise_first_error(self) -> None:
        """Raise the first error that a hook met, and forget the others: most follow from it."""
        errors, self.errors[:] = list(self.errors), []
        if errors:
            raise errors[0]

    def fold(self) -> list[Measured]:
        """What the forwards since the last fold add up to; their sampled sequences go to the reservoir.

        Returns
        -------
        list of Measured
            One for each change of the weights, mostly one.

        Raises
        ------
        CaptureError
            Where a state or connection did not show, or no gradient arrived; none of these forwards counts then.
        """
        with self._lock:
            self._absorb()
            done, self._measured = self._measured, []
            return done

    @property
    def pending(self) -> bool:
        """Whether forwards ended, or errors came, since the last fold."""
        return bool(self.forwards or self._measured or self.errors)

    def drop(self) -> None:
        """Forget the forwards since the last fold."""
        for forward in self.forwards:
            forward.release()
        self.forwards, self._measured = [], []
        self.errors.clear()

    def _absorb(self) -> None:
        done, self.forwards = self.forwards, []
        for forward in done:  # all are checked before any is counted
            self._require_complete(forward)
        for forward in done:
            forward.release()
            self.num_forwards += 1
            self.reservoir.store(forward.sequences(), forward.stamp)
            if not self._measured or self._measured[-1].stamp != forward.stamp:
                self._measured.append(Measured(forward.stamp, 0, []))
            self._measured[-1].add(forward)

    def _require_complete(self, forward: Forward) -> None:
        missing = [
            f"{self.structure.chains[number].name or 'depth'} {'final' if depth == FINAL else depth}: "
            f"{point.at} of {point.path or 'the model'}"
            for number, depth, point in self.structure.captured
            if ("state", number, depth) not in forward.fired
        ]
        missing += [
            f"connection {number}: {connection.path}"
            for number, connection in enumerate(self.structure.connections)
            if ("connection", 0, number) not in forward.fired
        ]
        if missing:
            raise CaptureError(
                f"{len(missing)} requested places did not fire in a forward: {', '.join(missing[:5])}. "
                "A compiled model skips hooks (capture before compiling), and a skipped layer has no state"
            )
        if self.options.gradients and not forward.arrived_gradients:
            raise CaptureError(
                "gradients were asked for but none arrived: call loss.backward() between the forward and step(), "
                "with gradients enabled in the forward"
            )
