"""What a measured step adds to a run: a row of statistics, pooled sums, and a live row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr

from depthscope.diagnostics.schema import validate
from depthscope.diagnostics.schema.live_rows import MemoryRows
from depthscope.diagnostics.schema.loss_course import LossCourse
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.loss_graph import mean_task
from depthscope.probes.run.build_run import build_run, step_numbers
from depthscope.probes.run.statistics_dataset import GRADIENT, StepStatistics
from depthscope.probes.session.forward import Measured, Stamp
from depthscope.probes.session.session import Session
from depthscope.probes.statistics.token_sums import TokenSums, merge_sums
from depthscope.probes.statistics.weight_updates import LossScale, WeightNorms, WeightUpdates
from depthscope.probes.training.notices import Notices

if TYPE_CHECKING:
    from depthscope.probes.training.live.findings import LiveRow
    from depthscope.probes.training.live.live import Live


FROZEN = "no gradient of the loss reaches the residual states: no weight before them is trained, as where a head alone learns"


class MeasuredSteps:
    """The measured steps of a recorder.

    ``earlier_losses``: of the steps before the first one.
    ``attrs``, ``token_text``: as in `probes.capture`.
    """

    def __init__(
        self,
        session: Session,
        *,
        earlier_losses: Iterable[float] = (),
        attrs: Mapping[str, Any] = MappingProxyType({}),
        token_text: Any = None,
        weights: WeightUpdates | None = None,
        scale: LossScale | None = None,
        live: Live | None = None,
    ):
        self.notices = Notices()
        self.session, self._say, self._attrs, self._token_text = session, self.notices.say, attrs, token_text
        self.weights, self._scale, self.live = weights, scale or LossScale(None), live
        self.history = MemoryRows()
        if live is not None:
            self.history.findings = live.watched.found  # one list: what is found is part of the history
        self.last: StepStatistics | None = None
        self._known_weights: WeightNorms | None = None  # of the last step that has some
        self.overflowed: list[int] = []
        self.trained = False  # whether the last measured step was one of a training
        self._without_connections: dict[int, str] = {}  # steps whose connections could not be read, and why
        self._sampled_step = 0  # the step of the raw sequences
        self._without_gradients = ""  # why a step has none, where they were asked for
        self._task: dict[str, Any] = {}  # what the loss of the last measured step is of
        self._pooled: list[TokenSums] = []  # sums of all steps since the weights last changed, by chain
        self._stamp: Stamp | None = None  # of these weights
        self._course = LossCourse(earlier_losses)

    def state(self) -> xr.DataTree:
        """The run of the last step."""
        # The step of the raw sequences: an analysis of them is labelled with it.
        attrs = {"step": self._sampled_step, **self._noted(), **self._attrs}
        return build_run(
            self.session,
            # Which modules have weights is known of a step without their norms too; its row has none.
            None if self.last is None else replace(self.last, weights=self._known_weights),
            self._pooled,
            attrs=attrs,
            token_text=self._token_text,
            metrics=None if self.live is None else self.live.datasets(),
        )

    def run(self) -> xr.DataTree:
        """The run of all steps."""
        groups = self.history.groups_of(self.state())
        found = xr.DataTree.from_dict({f"/{path}": dataset for path, dataset in groups.items()})
        validate(found)
        return found.load()

    def _noted(self) -> dict[str, Any]:
        """What is known of all measured steps together."""
        attrs: dict[str, Any] = {}
        if task := mean_task([self._task], None if self.last is None else self.last.loss):
            attrs["task"] = task
        if self.overflowed:
            attrs["overflowed_steps"] = list(self.overflowed)
        if self._without_gradients:
            attrs["without_gradients"] = self._without_gradients
        if missing := self._without_connections:
            attrs["without_connections"] = {
                "steps": list(missing),
                "why": list(dict.fromkeys(missing.values())),
            }
        if self._known_weights is not None and self._known_weights.skipped:
            attrs["weights_skipped"] = dict(self._known_weights.skipped)
        return attrs

    def end(self, step: int, loss: float | torch.Tensor | None, loss_terms: float | None = None) -> None:
        """End a step that was measured."""
        # First of all: hooks and copies end with the step, whatever fails below.
        cut_short = self.session.detach()
        weights, scale = self._weight_norms(step), self._scale.end()
        if cut_short:
            self._say(
                f"{cut_short} forward{'s' * (cut_short > 1)} had not ended when step {step} did, and count to no step"
            )
        value = self._loss_value(step, loss)
        self.session.raise_first_error()
        parts = self.session.fold()
        if not num_tokens(parts):
            raise CaptureError("no batch of it had a real token; nothing to measure")
        digest = self.session.step.digest
        self.trained = self.session.step.trains
        self._note_missing(step)
        complete: list[TokenSums] = []  # the sums of all forwards, by chain
        for part in parts:
            complete = merge_sums(complete, part.sums)
        sums = self._pool(parts, complete)
        # Overflow is common while a scaler looks for its scale: it skips such a step, whose gradients mean nothing.
        overflowed = scale is not None and (
            (weights is not None and weights.overflowed) or not finite_gradients(sums)
        )
        if overflowed:
            self.overflowed.append(step)
            self._say(
                f"gradients of step {step} overflowed at a loss scale of {scale:g}: they are NaN in its row, "
                "the forward's numbers are valid"
            )
            make_gradients_undefined(sums)
            weights = None if weights is None else weights.without_gradient()
        sequences = sum(part.batch_size for part in parts)
        # The numbers of the forward are right even where the gradients overflowed, so the row stays.
        row = StepStatistics(
            *(step, sums, sequences, value, weights, scale, self._course.add(value), loss_terms),
            digest=None if digest is None else float(digest),
        )
        self.last = row
        self._known_weights = weights or self._known_weights
        numbers, coords = step_numbers(self.session, row)
        of_live = None if self.live is None else self._measure_live(self.live, complete, row, overflowed)
        if of_live is not None:
            numbers, coords = {**numbers, **of_live.numbers}, {**coords, **of_live.coords}
        self.history.append(step, numbers, coords)
        if self.live is not None and of_live is not None:
            self.live.note_task(mean_task([self._task], value))
            self.live.tell(of_live, self._say)

    def _note_missing(self, step: int) -> None:
        """Say once what the present step lacks, which its forwards tell: the rest of it is in its row."""
        of = self.session.step
        if of.gradients_undefined:
            self.notices.say_once(
                "undefined gradients",
                f"gradients are NaN in the row of step {step}, and in others like it: several backwards went through "
                "one forward, and the squares of a sum cannot be added up; call backward once on the sum of the losses, or "
                "record with max_sequences of at least the batch",
            )
        if of.without_gradients:
            self._without_gradients = FROZEN
            self.notices.say_once(
                FROZEN,
                f"step {step} was measured without gradients, and so is every further one like it: {FROZEN}",
            )
        if not (why := of.without_connections):
            self._sampled_step = step
            return
        self._without_connections[step] = why
        self.notices.say_once(
            why,
            f"step {step} was measured without its connections, and so is every further step for which this "
            f"holds (the attribute without_connections names them): {why}",
        )

    def _measure_live(
        self,
        live: Live,
        complete: list[TokenSums],
        measured: StepStatistics,
        overflowed: bool,
    ) -> LiveRow | None:
        """The live row of the present step; where it cannot be computed, the step has its statistics alone."""

        def first_run() -> xr.DataTree:
            return build_run(self.session, measured, self._pooled)

        try:
            return live.measure(complete, measured, first_run, overflowed=overflowed)
        except Exception as error:
            self._say(f"the live metrics of step {measured.step} were not computed: {error}", error)
            return None

    def _loss_value(self, step: int, loss: float | torch.Tensor | None) -> float | None:
        """The loss of the step: the one that the user gives, else that of the backwards which reached the model."""
        self._task = self.session.step.loss.task
        if loss is None:
            return self.session.step.loss.value()
        try:
            return float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
        except (TypeError, ValueError, RuntimeError) as error:
            shape = f"of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
            self._say(
                f"the loss of step {step} was not stored: got a {type(loss).__name__} {shape}; expected one number",
                error,
            )
            return None

    def _pool(self, parts: list[Measured], complete: list[TokenSums]) -> list[TokenSums]:
        """Add the parts of a step to the pooled statistics; returns the compact statistics of its row."""
        row = [chain.compact() for chain in complete]
        for part in parts:
            for chain in part.sums:
                chain.live = None  # of this step alone, and as large as its number of tokens
        if self.session.step.without_connections and parts[-1].stamp != self._stamp:
            return row  # what is pooled has the weights of the raw sequences, which are of an earlier step
        # An error from here on leaves half of a sum: what is pooled begins anew then.
        (pooled, self._pooled), (stamp, self._stamp) = (self._pooled, []), (self._stamp, None)
        for part in parts:
            # Sums over several steps describe one model only as long as its weights are the same.
            if part.stamp != stamp:
                pooled, stamp = [], part.stamp
            pooled = merge_sums(pooled, part.sums)
        self._pooled, self._stamp = pooled, stamp
        return row

    def _weight_norms(self, step: int) -> WeightNorms | None:
        if self.weights is None:
            return None
        try:
            return self.weights.end()
        except Exception as error:
            self._say(f"the weights of step {step} were not measured: {error}", error)
            return None


def finite_gradients(sums: list[TokenSums]) -> bool:
    """Whether no gradient overflowed."""
    gradients = (chain.sums.get(GRADIENT, {}) for chain in sums)
    return all(bool(value.isfinite().all()) for parts in gradients for value in parts.values())


def make_gradients_undefined(sums: list[TokenSums]) -> None:
    """Put NaN in place of every sum of gradients."""
    for chain in sums:
        parts = chain.sums.get(GRADIENT, {})
        chain.sums[GRADIENT] = {key: torch.full_like(value, math.nan) for key, value in parts.items()}


def num_tokens(parts: list[Measured]) -> float:
    """The number of real tokens of all chains, at their first depths."""
    counts = [chain.sums.get("token_count", {}) for part in parts for chain in part.sums]
    return sum(float(next(iter(count.values()))) for count in counts if count)
