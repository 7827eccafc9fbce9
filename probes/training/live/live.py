"""What happens at the end of a measured step? Its row is computed, judged and handed on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import xarray as xr

from depthscope.diagnostics.analysis.analyze import find_metric
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.quantities.registry import ROW_FACTS
from depthscope.diagnostics.verdicts import VERDICTS
from depthscope.probes.run.statistics_dataset import GRADIENT, StepStatistics
from depthscope.probes.session.session import Session
from depthscope.probes.statistics.token_sums import TokenSums
from depthscope.probes.training.live.exact_quantities import live_groups
from depthscope.probes.training.live.findings import (
    SAMPLED_TOKENS,
    OnFinding,
    Say,
    Watched,
    datasets_of,
    scalars,
)
from depthscope.probes.training.live.row import LIVE, LiveMetrics, LiveRow
from depthscope.probes.training.sinks import LearningRate, Sink


class Live:
    """The live metrics of one recorder.

    ``session``: of the recorder, with ``live_tokens``.
    ``names``: metrics of the catalogue, see `live_names`.
    ``name``: of the run, for what is printed: several may be recorded at a time.
    ``optimizer``: whose learning rate is recorded.
    ``sinks``: each is called with a step and named numbers.
    ``on_finding, stop_on``: as of `Watched`.
    """

    def __init__(
        self,
        session: Session,
        names: Sequence[str],
        *,
        name: str = "",
        optimizer: torch.optim.Optimizer | None = None,
        sinks: Iterable[Sink] = (),
        on_finding: OnFinding | None = None,
        stop_on: str | None = None,
    ) -> None:
        self.last: LiveRow | None = None  # the row of the last step that has one
        self.attrs: dict[str, dict[str, Any]] = {}  # of the groups, as the first step showed them
        self._session = session
        self._metrics = LiveMetrics(session, names)
        self.rate = LearningRate(optimizer, session.report)
        self._sinks = list(sinks)
        self.watched = Watched(on_finding, stop_on, name)

    def measure(
        self,
        sums: Sequence[TokenSums],
        measured: StepStatistics,
        first_run: Callable[[], xr.DataTree],
        *,
        overflowed: bool = False,
    ) -> LiveRow:
        """Compute the row of a step.

        ``measured``: the row of statistics of the same step.
        ``first_run``: builds the run of the first measured step, which describes the model.
        """
        if not self._metrics.groups:
            run = first_run()
            self._metrics.groups = live_groups(self._session, run)
            # What holds at every step; other facts are in the rows.
            self.attrs = {
                group.chain: {name: value for name, value in group.attrs.items() if name not in ROW_FACTS}
                for group in self._metrics.groups
            }
        if overflowed:
            _forget_gradients(sums)
        self.last = self._metrics.row(sums, measured, self.rate.value())
        return self.last

    def tell(self, row: LiveRow, say: Say) -> None:
        """Hand a row to the sinks, and what is new in its findings to the user."""
        named = scalars(row) if self._sinks else {}
        for sink in list(self._sinks):
            try:
                sink(row.step, named)
            except Exception as error:
                self._sinks.remove(sink)  # one sentence, and not one at every step
                name = getattr(sink, "__qualname__", type(sink).__name__)
                say(f"the sink {name} failed at step {row.step} and gets no further rows: {error}", error)
        self.watched.take(row, self.attrs, say)

    def note_task(self, task: Mapping[str, Any]) -> None:
        """What the loss of the last step is of, by which its row is judged as a run is that has it."""
        for attrs in self.attrs.values():
            attrs.pop("task", None)
            attrs |= {"task": dict(task)} if task else {}

    def look_at(self, step: int, loss: float | torch.Tensor | None, say: Say) -> None:
        """Judge whether the loss of a step that is not measured is finite, where nothing has to wait for it.

        ``loss``: of the step; one on another device than the CPU is not read.
        """
        if isinstance(loss, torch.Tensor):
            if loss.device.type != "cpu" or loss.numel() != 1:
                return
            loss = float(loss.detach())
        if isinstance(loss, (int, float)) and not math.isfinite(loss):
            row = xr.Dataset({"loss_not_finite": 1.0}, attrs=next(iter(self.attrs.values()), {}))
            self.watched.report(step, VERDICTS["not_finite"].findings(row), say)

    def datasets(self) -> dict[str, xr.Dataset]:
        """The metrics of the last row by chain; empty where there is none."""
        if self.last is None:
            return {}
        tokens = {"live": True, SAMPLED_TOKENS: self._session.step.scope.live_tokens}
        return datasets_of(self.last, {chain: {**attrs, **tokens} for chain, attrs in self.attrs.items()})


def _forget_gradients(sums: Sequence[TokenSums]) -> None:
    for chain in sums:
        for part in (chain, chain.mean_view):
            if part is not None:
                part.sums.pop(GRADIENT, None)
        if chain.live is not None:
            chain.live.gradient_norms.clear()


def live_names(metrics: str | Iterable[str]) -> tuple[str, ...]:
    """The metrics that a recorder computes at every measured step.

    ``metrics``: ``"live"``, ``"all"`` (every default metric that needs no whole sequences), or names of the catalogue.
    Raises InputError: For an unknown name, or a metric of whole sequences.
    """
    if metrics == "live":
        return LIVE
    if metrics == "all":
        more = [name for name in CATALOGUE if not _needs_more(name)]
        return tuple(dict.fromkeys((*LIVE, *more)))
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    for name in names:
        find_metric(name)
        if _needs_more(name):
            raise InputError(
                f"{name} cannot be computed on the sampled tokens of a step; choose others, and compute it from the stored "
                f"sequences: analyze(run, metrics={name!r})"
            )
    return names


def _needs_more(name: str) -> bool:
    """Whether a metric needs whole sequences, sums over many steps, or the attention of a capture."""
    metric = CATALOGUE[name]
    beyond = {"query_entropy", "query_keys", "query_first_weight"}
    return metric.of_sequences or bool(beyond & set(metric.roots))
