"""How is the user's own loop measured? Every so many steps, between which no hook is on."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

import torch
import xarray as xr
from torch import nn

from depthscope.diagnostics.errors import InputError
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import remove_inert_hooks
from depthscope.probes.session.options import Options
from depthscope.probes.session.session import Session
from depthscope.probes.training.live_recording import LiveRecording
from depthscope.probes.training.measured_steps import MeasuredSteps
from depthscope.probes.training.notices import OPEN, close_at_exit


class Recorder:
    """Measure the model inside a ``with`` block; `step` ends one step of the user's loop.

    Every measured step gives one row of ``/statistics`` (exact over all its tokens). The raw sequences in ``/trace`` are a
    uniform sample of all that ran with the *present* weights: over an evaluation all batches, in training the last
    measured step. Memory does not grow with the number of batches, except for the few numbers of each row.

    `record` makes one, and documents its arguments.
    """

    def __init__(
        self,
        measured: MeasuredSteps,
        every: int = 1,
        start_step: int = 0,
        end_step: int | None = None,
        first_step: int = 0,
        store: LiveRecording | None = None,
    ):
        if every < 1:
            raise InputError(f"every is {every}; expected 1 or more")
        self._measured, self._notices = measured, measured.notices
        self._session, self._live, self._store = measured.session, measured.live, store
        self._say, self.errors = self._notices.say, self._notices.errors
        self.position = first_step  # the present step
        self._every, self._start, self._end = every, start_step, end_step
        self._stack = ExitStack()
        self._state = "new"  # then "open" inside the ``with`` block, "closed", and "abandoned" in a child process or a copy
        self._lock = threading.RLock()

    def __enter__(self) -> Recorder:
        with self._lock:
            if self._state == "open":
                raise CaptureError(
                    "this recorder is open already; make another one for a block inside its block"
                )
            if self._state != "abandoned":
                self._state = "open"
                OPEN.add(self)
                if self._store is not None:
                    close_at_exit()
                    self._open_store(self._store)
                self._attach_if_measuring()
        self._notices.warn()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        # The exception may have cut a backward short, which left only some of the gradients: the last step is not
        # measured then. Without gradients its forwards are complete, and count.
        if self._state == "open":
            self._measured.weights = None
            if self._session.options.gradients:
                self._session.drop()
        # Such as a warning that the user turned into an error: theirs goes on as it is.
        with suppress(Exception):
            self.close()

    def __del__(self) -> None:
        if getattr(self, "_state", "new") == "open" and not sys.is_finalizing():
            self._say("a recorder was never closed; use it in a with block")
            self.close()

    def __reduce__(self) -> Any:
        # An object of the user's that holds the recorder may be copied, or sent to a worker of a loader.
        return _copy_that_measures_nothing, ()

    def step(self, loss: float | torch.Tensor | None = None, *, loss_terms: float | None = None) -> None:
        """End one step: record its forwards and backwards as a row, and start the next one.

        Any thread may call it. A forward that another thread is running then counts to no step.

        Parameters
        ----------
        loss : float or Tensor, optional
            The step's loss, to be stored with the statistics; of several processes that of this one. Where it is not given, it
            is the sum of what ``backward`` was called on, of every backward that reached the model, over the loss scale. Of a
            step that is not measured it is only looked at whether one on the CPU is finite, where `metrics` are computed.
        loss_terms : float, optional
            Of how many terms the loss is the mean, such as labels that are not ignored; by default of all its tokens. By it
            the losses and gradients of several processes are weighted when their parts are joined.

        Raises
        ------
        TrainingStopped
            With ``stop_on=``, where the step has a new finding as severe as that; its row is recorded.
        """
        with self._lock:
            if self._state in ("new", "closed"):
                raise CaptureError(
                    "step() outside the block: use it inside `with ds.record(model) as recorder:`"
                )
            if self._state == "open":
                if self.measuring:
                    self._safely(self._end_measured_step, loss, loss_terms)
                elif self._live is not None:
                    self._live.look_at(self.position, loss, self._say)
                self.position += 1
                self._attach_if_measuring()
            else:
                self.position += 1
        self._notices.warn()
        # Last of all: nothing of ours is half done when the training ends here.
        if self._live is not None:
            self._live.watched.stop_if_severe()

    @property
    def is_open(self) -> bool:
        """Whether the block has begun and not ended."""
        return self._state == "open"

    @property
    def measuring(self) -> bool:
        """Whether the present step is measured."""
        since = self.position - self._start
        return since >= 0 and since % self._every == 0 and (self._end is None or self.position < self._end)

    @property
    def measured_steps(self) -> list[int]:
        """The steps that were measured so far."""
        return list(map(int, self._measured.history.steps))

    @property
    def run(self) -> xr.DataTree:
        """The run so far.

        Raises
        ------
        CaptureError
            Where no step was measured completely; the message includes the first error.
        """
        if not self._measured.history.rows:
            reason = f": {self.errors[0]}" if self.errors else "; call the model and then recorder.step()"
            raise CaptureError(f"no step was measured completely{reason}")
        return self._measured.run()

    def close(self) -> None:
        """Remove the hooks, and end the store where one was given; calling it twice is fine."""
        with self._lock:
            if self._state != "open":
                return
            self._state = "closed"
            OPEN.discard(self)
            try:
                # The loop ended before step(), after complete forwards. An evaluation after a training is no step of it.
                unended = self._session.pending and self._session.step.trains >= self._measured.trained
                if self.measuring and unended:
                    self._safely(self._end_measured_step, None)
                self._notices.say_how_many()
                if self._live is not None:
                    self._live.watched.judge(self._live.attrs, self._say)
                    self._live.watched.say_too_late(self._say)
            finally:
                self._detach()
                remove_inert_hooks(self._session.model)
            if self._store is not None:
                try:
                    self._store.finish(self._measured.history, self._measured.state, self._measured.run)
                # What follows the block, such as saving the model, must still be reached.
                except Exception as error:
                    lost = "It is still in recorder.run: save it under another name with save_run"
                    self._say(f"the run was not saved: {error}. {lost}", error)
        self._notices.warn()

    def abandon(self) -> None:
        """Stop for good, silently: what is open belongs to another process."""
        self._state, self._store, self._live = "abandoned", None, None
        self._measured.live = None
        self._notices.forget()
        self._lock = threading.RLock()  # a thread that does not exist here may hold the old one
        self._session.after_fork()
        self._detach()
        OPEN.discard(self)

    def _open_store(self, store: LiveRecording) -> None:
        try:
            store.open()
        except Exception as error:  # the loop is about to run, and it must
            self._say(f"nothing is written to {store.path}: {error}", error)
            return
        known = [step for step in store.earlier_attrs.get("overflowed_steps", ()) if step < self.position]
        self._measured.overflowed[:0] = known

    def _end_measured_step(self, loss: float | torch.Tensor | None, loss_terms: float | None = None) -> None:
        self._measured.end(self.position, loss, loss_terms)
        if self._store is None:
            return
        sentence = self._store.write(self._measured.history, self._measured.state)
        if sentence is not None:
            self._say(sentence)

    def _safely(self, action: Callable[..., None], *args: Any) -> None:
        """Run what ends a step; where it cannot be measured, say so and leave it out."""
        try:
            action(*args)
        except (Exception, GeneratorExit) as error:
            self._session.drop()
            self._notices.say_not_measured(self.position, error)

    def _attach_if_measuring(self) -> None:
        """Remove the hooks of the step before, and put on those of the present one if it is measured."""
        self._detach()
        if not self.measuring:
            return
        # Each is undone even where it fails halfway, hence the callbacks first.
        try:
            self._stack.callback(self._session.detach)
            self._session.attach()
            if (weights := self._measured.weights) is not None:
                self._stack.callback(weights.drop)
                weights.begin()
            if self._live is not None:
                self._stack.enter_context(self._live.rate.noted())
        except Exception as error:
            self._detach()
            self._say(f"step {self.position} cannot be measured: {error}", error)

    def _detach(self) -> None:
        self._stack.close()
        self._stack = ExitStack()


def _copy_that_measures_nothing() -> Recorder:
    recorder = Recorder(MeasuredSteps(Session(nn.Identity(), Options())))
    recorder._state = "abandoned"
    return recorder
