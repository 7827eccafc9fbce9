"""How is the user's own loop measured? Every so many steps, between which no hook is on."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

import torch
import xarray as xr
from torch import nn

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.quantities.losses import LossCourse
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import remove_inert_hooks
from depthscope.probes.model.loss_graph import mean_task
from depthscope.probes.run.build_run import Proven, build_run
from depthscope.probes.run.statistics_dataset import StepStatistics
from depthscope.probes.session.forward import Measured
from depthscope.probes.session.options import Options
from depthscope.probes.session.session import Session
from depthscope.probes.statistics.loss_scale import LossScale
from depthscope.probes.statistics.row_sums import RowSums
from depthscope.probes.statistics.token_sums import TokenSums
from depthscope.probes.statistics.weight_updates import WeightNorms, WeightUpdates
from depthscope.probes.training.live.findings import TrainingStopped
from depthscope.probes.training.live.live import Live
from depthscope.probes.training.live_recording import LiveRecording
from depthscope.probes.training.notices import Notices
from depthscope.probes.training.open_recorders import OPEN, close_at_exit
from depthscope.probes.training.ranks.channel import LostError
from depthscope.probes.training.ranks.exchange import Ranks
from depthscope.probes.training.ranks.local import measured_here, num_tokens, partial_sequences
from depthscope.probes.training.ranks.sequence_parts import put_together
from depthscope.probes.training.settled_end import SettledEnd
from depthscope.probes.training.step_sums import (
    PooledSums,
    added_up,
    finite_gradients,
    make_gradients_undefined,
)


class Recorder:
    """Measure the model inside a ``with`` block; `step` ends one step of the user's loop.

    Every measured step gives one row of ``/statistics`` (exact over all its tokens). The raw sequences in ``/trace`` are a
    uniform sample of all that ran with the *present* weights: over an evaluation all batches, in training the last
    measured step. Memory does not grow with the number of batches, except for the few numbers of each row.

    `record` makes one, and says what its arguments are.
    """

    def __init__(
        self,
        session: Session,
        *,
        every: int = 1,
        start_step: int = 0,
        end_step: int | None = None,
        store: LiveRecording | None = None,
        first_step: int = 0,
        attrs: Mapping[str, Any] | None = None,
        token_text: Any = None,
        weights: WeightUpdates | None = None,
        scale: LossScale | None = None,
        live: Live | None = None,
        ranks: Ranks | None = None,
        settled: SettledEnd | None = None,
    ):
        if every < 1:
            raise InputError(f"every is {every}; expected 1 or more")
        self._notices = Notices()
        self._say = self._notices.say
        self.errors = self._notices.errors
        self.position = first_step  # the present step
        self._session = session
        self._every, self._start, self._end = every, start_step, end_step
        self._store, self._attrs, self._token_text = store, attrs, token_text
        self._weights, self._scale, self._live = weights, scale or LossScale(None), live
        self._ranks, self._settled = ranks, settled
        session.step.keeps_rest &= ranks is None  # the sums of several processes have the same statistics
        self._rows: list[StepStatistics] = []
        self._overflowed: list[int] = []
        self._without_connections: dict[int, str] = {}  # steps whose connections could not be read, and why
        self._sampled_step = 0  # the step of the raw sequences
        self._told_undefined = False  # that several backwards through one forward leave no gradients
        self._task: dict[str, Any] = {}  # what the loss of the last measured step is of
        self._trained = False  # whether the last measured step was one of a training
        self._pooled = PooledSums()
        self._course = LossCourse([] if store is None else store.earlier_losses(first_step))
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
                if self._ranks is not None:
                    self._meet(self._ranks)
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
            self._weights = None
            self._session.forget_running()
            if self._session.options.gradients:
                self._session.drop()
        with suppress(
            Exception
        ):  # such as a warning that the user turned into an error: theirs goes on as it is
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
            Of how many terms the loss of this process is the mean, such as labels that are not ignored; by default of all its
            tokens. By it the losses and gradients of several processes are weighted.

        Raises
        ------
        TrainingStopped
            With ``stop_on=``, where the step has a new finding as severe as that; its row is recorded. Several processes stop
            together, at the end of the measured step after it.
        """
        with self._lock:
            if self._state in ("new", "closed"):
                raise CaptureError(
                    "step() outside the block: use it inside `with probes.record(model) as recorder:`"
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
        if self._ranks is not None:
            self._stop_together(self._ranks)
        elif self._live is not None:
            self._live.stop_if_severe()

    def _stop_together(self, ranks: Ranks) -> None:
        """Stop where the first process asked for it one measured step ago; ask for it where it has to be."""
        ranks.stop_now(self.position - 1)
        if self._live is not None:
            try:
                self._live.stop_if_severe()
            except TrainingStopped as stopped:
                ranks.stop_later(stopped)

    def _meet(self, ranks: Ranks) -> None:
        """Meet the other processes, as the block begins."""
        try:
            self.position = ranks.open(self.position)
        except LostError as error:
            self._say(str(error), error)
        except BaseException:
            self._state = "new"
            OPEN.discard(self)
            raise

    @property
    def is_open(self) -> bool:
        """Whether the block has begun and not ended."""
        return self._state == "open"

    @property
    def measuring(self) -> bool:
        """Whether the present step is measured."""
        since = self.position - self._start
        if self._ranks is not None and not self._ranks.is_open:
            return False
        return since >= 0 and since % self._every == 0 and (self._end is None or self.position < self._end)

    @property
    def measured_steps(self) -> list[int]:
        """The steps that were measured so far."""
        return [row.step for row in self._rows]

    @property
    def run(self) -> xr.DataTree:
        """The run so far.

        Raises
        ------
        CaptureError
            Where no step was measured completely; the message includes the first error.
        """
        if not self._rows:
            reason = f": {self.errors[0]}" if self.errors else "; call the model and then recorder.step()"
            if self._ranks is not None and not self._ranks.writes:
                reason += f"; of several processes the run is in process {self._ranks.group.ranks[0]}"
            raise CaptureError(f"no step was measured completely{reason}")
        run = self._build(self._rows)
        run.attrs.update({} if self._settled is None else self._settled.found)
        return run

    def _build(self, rows: list[StepStatistics], proven: Proven | None = None) -> xr.DataTree:
        # The step of the raw sequences: an analysis of them is labelled with it.
        attrs = {"step": self._sampled_step, **self._noted(), **(self._attrs or {})}
        return build_run(
            self._session,
            rows,
            self._pooled.sums,
            attrs=attrs,
            token_text=self._token_text,
            proven=proven,
            metrics=None if self._live is None else self._live.datasets(),
        )

    def _noted(self) -> dict[str, Any]:
        """What is known of all measured steps together."""
        attrs: dict[str, Any] = {} if self._ranks is None else dict(self._ranks.attrs)
        if task := mean_task([self._task], self._rows[-1].loss if self._rows else None):
            attrs["task"] = task
        if self._overflowed:
            attrs["overflowed_steps"] = list(self._overflowed)
        if missing := self._without_connections:
            attrs["without_connections"] = {
                "steps": list(missing),
                "why": list(dict.fromkeys(missing.values())),
            }
        last = next((row.weights for row in reversed(self._rows) if row.weights is not None), None)
        if last is not None and last.skipped:
            attrs["weights_skipped"] = dict(last.skipped)
        return attrs

    def close(self) -> None:
        """Remove the hooks, and end the store where one was given; calling it twice is fine."""
        with self._lock:
            if self._state != "open":
                return
            self._state = "closed"
            OPEN.discard(self)
            try:
                # The loop ended before step(), after complete forwards. An evaluation after a training is no step of it. Of
                # several processes the others may not have such a step, and would be waited for.
                unended = self._session.pending and self._session.step.trains >= self._trained
                if self.measuring and unended and self._ranks is None:
                    self._safely(self._end_measured_step, None)
                self._notices.say_how_many()
                if self._live is not None:
                    self._live.judge(self._say)
                    self._live.say_too_late(self._say)
            finally:
                self._detach()
                if self._ranks is not None:
                    self._ranks.close()
                remove_inert_hooks(self._session.model)
            if self._settled is not None and self._rows:
                self._settle(self._settled)
            if self._store is not None:
                self._finish_store(self._store)
        self._notices.warn()

    def _settle(self, settled: SettledEnd) -> None:
        try:
            settled.settle(self.run)
        except Exception as error:  # what follows the block must still be reached
            self._say(f"what is suspected was not settled: {error}", error)

    def abandon(self) -> None:
        """Stop for good, silently: what is open belongs to another process."""
        self._state, self._store, self._live, self._ranks = "abandoned", None, None, None
        self._notices.forget()
        self._lock = threading.RLock()  # a thread that does not exist here may hold the old one
        self._session.after_fork()
        self._detach()
        OPEN.discard(self)

    def _open_store(self, store: LiveRecording) -> None:
        try:
            earlier = store.open()
        except Exception as error:  # the loop is about to run, and it must
            self._say(f"nothing is written to {store.path}: {error}", error)
            return
        known = [step for step in earlier.get("overflowed_steps", ()) if step < self.position]
        self._overflowed = [*known, *self._overflowed]

    def _write_store(self, store: LiveRecording) -> None:
        row_of = None if self._live is None else self._live.row_of
        sentence = store.write(self._session, self._rows, self._build, self._noted(), row_of)
        if sentence is not None:
            self._say(sentence)

    def _finish_store(self, store: LiveRecording) -> None:
        try:
            store.finish(self._rows, lambda: self.run)
        except Exception as error:  # what follows the block, such as saving the model, must still be reached
            self._say(
                f"the run was not saved: {error}. It is still in recorder.run: save it under another name with save_run",
                error,
            )

    def _end_measured_step(self, loss: float | torch.Tensor | None, loss_terms: float | None = None) -> None:
        """Add the row of the present step."""
        # First of all: hooks and copies end with the step, whatever fails below.
        cut_short = self._session.detach()
        weights, scale = self._weight_norms(), self._scale.end()
        if cut_short:
            self._say(
                f"{cut_short} forward{'s' * (cut_short > 1)} had not ended when step {self.position} did, and count to no step"
            )
        value = self._loss_value(loss)
        if self._ranks is not None:
            together = self._of_all_processes(self._ranks, value, loss_terms, weights)
            if together is None:
                return
            parts, value, weights = together
        else:
            self._session.raise_first_error()
            parts = self._session.fold()
            if not num_tokens(parts):
                raise CaptureError("no batch of it had a real token; nothing to measure")
        self._trained = self._session.step.trains
        self._tell_undefined_gradients()
        self._tell_missing_connections()
        complete = added_up(parts)
        sums = self._pool(parts, complete)
        # Overflow is common while a scaler looks for its scale: it skips such a step, whose gradients mean nothing.
        overflowed = scale is not None and (
            (weights is not None and weights.overflowed) or not finite_gradients(sums)
        )
        if overflowed:
            self._overflowed.append(self.position)
            self._say(
                f"gradients of step {self.position} overflowed at a loss scale of {scale:g}: they are NaN in its row, "
                "the forward's numbers stand"
            )
            make_gradients_undefined(sums)
            weights = None if weights is None else weights.without_gradient()
        sequences = sum(part.batch_size for part in parts)
        # The numbers of the forward are right even where the gradients overflowed, so the row stays.
        rows = [RowSums(chain) for chain in sums]
        row = StepStatistics(self.position, rows, sequences, value, weights, scale, self._course.add(value))
        self._rows.append(row)
        if self._live is not None:
            self._measure_live(self._live, complete, row, overflowed)
        if self._store is not None:
            self._write_store(self._store)

    def _tell_undefined_gradients(self) -> None:
        """Say once where the gradients of the present step are undefined, which their forwards tell."""
        if self._told_undefined or not self._session.step.gradients_undefined:
            return
        self._told_undefined = True
        self._say(
            f"gradients are NaN in the row of step {self.position}, and in others like it: several backwards went through "
            "one forward, and the squares of a sum cannot be added up; call backward once on the sum of the losses, or "
            "record with max_sequences of at least the batch"
        )

    def _tell_missing_connections(self) -> None:
        """Say where the connections of the present step were not read: the rest of it is in its row."""
        why = self._session.step.without_connections
        if not why:
            self._sampled_step = self.position
            return
        if why not in self._without_connections.values():
            self._say(
                f"step {self.position} was measured without its connections, and so is every further step for which this "
                f"holds (the attribute without_connections names them): {why}"
            )
        self._without_connections[self.position] = why

    def _of_all_processes(
        self, ranks: Ranks, loss: float | None, loss_terms: float | None, weights: WeightNorms | None
    ) -> tuple[list[Measured], float | None, WeightNorms | None] | None:
        """What all processes measured in the present step; None where this one does not write."""
        local, failure = measured_here(self._session, loss, loss_terms)
        num_modules = 0 if self._weights is None else self._weights.num_modules
        sequences = partial_sequences(self._session)
        try:
            together = ranks.exchange(self.position, local, weights, num_modules, failure)
            if together is not None and sequences and ranks.shards is not None:
                if together[0].parts is None:
                    raise CaptureError(
                        "the process that writes has no part of the sequences that others share"
                    )
                put_together(sequences, together[0].parts, len(ranks.shards.ranks))
        except BaseException:
            if sequences:
                self._session.step.reservoir.forget()  # they stay parts
            raise
        for sequence in sequences:
            sequence.part = None  # in the other processes too: nobody asks for it again
        if together is None:
            return None
        step, weights = together
        stamp = self._session.step.stamp(self._session.model)
        return [Measured(stamp, round(step.sequences), step.sums)], step.loss, weights

    def _measure_live(
        self,
        live: Live,
        complete: list[TokenSums],
        measured: StepStatistics,
        overflowed: bool,
    ) -> None:
        """Add the live row of the present step; where it cannot be computed, the step's statistics stand."""
        step = self.position

        def first_run() -> xr.DataTree:
            return build_run(self._session, self._rows, self._pooled.sums, digests=False)

        try:
            row = live.measure(complete, measured, first_run, overflowed=overflowed)
        except Exception as error:
            self._say(f"the live metrics of step {step} were not computed: {error}", error)
            return
        live.note_task(mean_task([self._task], measured.loss))
        live.tell(row, self._say)

    def _loss_value(self, loss: float | torch.Tensor | None) -> float | None:
        """The loss of the step: the one that the user gives, else that of the backwards which reached the model."""
        self._task = self._session.step.loss.task
        if loss is None:
            return self._session.step.loss.value()
        try:
            return float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
        except (TypeError, ValueError, RuntimeError) as error:
            shape = f"of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
            self._say(
                f"the loss of step {self.position} was not stored: a {type(loss).__name__} {shape} came; expected one number",
                error,
            )
            return None

    def _pool(self, parts: list[Measured], complete: list[TokenSums]) -> list[TokenSums]:
        """Add the parts of a step to the pooled statistics; returns the compact statistics of its row."""
        row = [chain.compact() for chain in complete]
        for part in parts:
            for chain in part.sums:
                chain.live = None  # of this step alone, and as large as its number of tokens
        if self._session.step.without_connections and not self._pooled.is_of(parts[-1].stamp):
            return row  # what is pooled has the weights of the raw sequences, which are of an earlier step
        self._pooled.add(parts)
        return row

    def _weight_norms(self) -> WeightNorms | None:
        if self._weights is None:
            return None
        try:
            return self._weights.end()
        except Exception as error:
            self._say(f"the weights of step {self.position} were not measured: {error}", error)
            return None

    def _safely(self, action: Callable[..., None], *args: Any) -> None:
        """Run what ends a step; where it cannot be measured, say so and leave it out."""
        try:
            action(*args)
        except (Exception, GeneratorExit) as error:
            self._session.drop()
            self._notices.say_not_measured(self.position, error)
        else:
            self._notices.say_how_many()

    def _attach_if_measuring(self) -> None:
        """Remove the hooks of the step before, and put on those of the present one if it is measured."""
        self._detach()
        if not self.measuring:
            return
        # Each is undone even where it fails halfway, hence the callbacks first.
        try:
            if self._settled is not None:
                self._stack.enter_context(self._settled.watching())
            self._stack.callback(self._session.detach)
            self._session.attach()
            if self._weights is not None:
                self._stack.callback(self._weights.drop)
                self._weights.begin()
            if self._live is not None:
                self._stack.enter_context(self._live.rate.noted())
        except Exception as error:
            self._detach()
            self._say(f"step {self.position} cannot be measured: {error}", error)

    def _detach(self) -> None:
        self._stack.close()
        self._stack = ExitStack()


def _copy_that_measures_nothing() -> Recorder:
    recorder = Recorder(Session(nn.Identity(), Options()))
    recorder._state = "abandoned"
    return recorder
