"""What happens at the end of a measured step? Every live metric is computed as plain arrays, judged and handed on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import xarray as xr

from depthscope.diagnostics.analysis.analyze import find_metric
from depthscope.diagnostics.analysis.training_curves import OF_LOSSES, sums_of
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.metrics.declaration import Metric
from depthscope.diagnostics.quantities.exact_sums import EXACT
from depthscope.diagnostics.quantities.registry import CHOICES, LABELS, ROW_FACTS, Quantities, Unavailable
from depthscope.diagnostics.schema.variables import OF_SUMS
from depthscope.diagnostics.verdicts import VERDICTS
from depthscope.probes.run.connection_variables import weight_variables
from depthscope.probes.run.initial_weights import is_untouched
from depthscope.probes.run.statistics_dataset import GRADIENT, StepStatistics
from depthscope.probes.session.session import Session
from depthscope.probes.statistics.token_sums import TokenSums
from depthscope.probes.statistics.weight_updates import WeightNorms
from depthscope.probes.training.live.findings import (
    SAMPLED_TOKENS,
    LiveRow,
    Number,
    Numbers,
    OnFinding,
    Say,
    Watched,
    datasets_of,
    scalars,
)
from depthscope.probes.training.live.quantities import (
    CHOSEN,
    EXACT_QUANTITIES,
    LiveGroup,
    SampledTokens,
    exact_quantities,
    live_groups,
    sampled,
)
from depthscope.probes.training.sinks import LearningRate, Sink

LIVE = (
    *("residual_norm", "gradient_norm", "backward_gain", "relative_gradient"),
    *("adjacent_cosine", "token_cosine", "massive_token_fraction", "massive_activation"),
    *("stream_cosine", "closest_stream_cosine"),
    *("mixing_gain", "composite_gain", "read_share", "write_share"),
    *("effective_rank", "participation_ratio", "corrected_participation_ratio"),
    *("cka", "adjacent_cka", "angular_distance", "block_influence", "num_tokens"),
    *("deflated_gain", "relative_deflated_gain", "identity_distance"),
    *("doubly_stochastic_violation", "composite_attenuation", "composite_singular_value", "signal_share"),
)
"""Metrics of ``metrics="live"``, with ranks in the mean over streams alone; any other metric is live by its name."""

OF_COUNTS = {"noise_rows", "num_features", "token_masks", "token_counts", *CHOICES}
"""Quantities that do not change from step to step as long as the numbers of sampled tokens do not."""


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
        self._names = tuple(names)
        self.groups: list[LiveGroup] = []  # as the first step showed them
        self._positions: list[np.ndarray] = []  # of the tokens of the first step
        self._counts: tuple[int, ...] = ()
        self._known_nulls: dict[str, Any] = {}
        self._touched: set[int] = set()  # chains whose weights are not as initialisers leave them any more
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
        if not self.groups:
            run = first_run()
            self.groups = live_groups(self._session, run)
            # What holds at every step; other facts are in the rows.
            self.attrs = {
                group.chain: {name: value for name, value in group.attrs.items() if name not in ROW_FACTS}
                for group in self.groups
            }
        if overflowed:
            _forget_gradients(sums)
        numbers: dict[str, Any] = {}
        coords: dict[str, Any] = {}
        not_computed: dict[str, dict[str, str]] = {}
        rate = self.rate.value()
        for at, group in enumerate(self.groups):
            more, more_coords = self._weights(group, measured.weights)
            more |= self._start(group) | _of_loss(measured)
            more["same_sampled_tokens"] = self._same_tokens(at, group, sums[group.number])
            if rate is not None:
                how = "of the first group of the optimizer's parameters"
                more["learning_rate"] = _number(rate, how)
            tokens = SampledTokens(sums[group.number], group, each_stream=self._names != LIVE)
            source = tokens.source(exact_quantities(sums[group.number], group))
            values, reasons = self._values(group, tokens, source)
            stamped = {name: _stamped(name, of, group) for name, of in (values | more).items()}
            counts = at, tokens.count, int(tokens.massive_K.sum())
            nulls = self._nulls(counts, group, source, values)
            numbers |= {group.path(name): of for name, of in stamped.items()}
            for name, part in (_coords(group, stamped) | more_coords | nulls).items():
                coords[group.path(name)] = part
            not_computed[group.chain] = reasons
        self.last = LiveRow(measured.step, numbers, coords, not_computed)
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

    def _values(
        self, group: LiveGroup, tokens: SampledTokens, source: Quantities
    ) -> tuple[dict[str, Number], dict[str, str]]:
        """Values by name with their estimator, and why other metrics have none."""
        values: dict[str, Number] = {}
        reasons: dict[str, str] = {}
        for name, metric in _applicable(self._names, bool(group.connections)).items():
            try:
                value = source.call(metric.function)
            except Unavailable as reason:
                reasons[name] = str(reason)
                continue
            is_exact = set(metric.needs) <= {*EXACT_QUANTITIES, *CHOICES}
            attrs = dict(value.attrs) if is_exact else {}
            attrs["estimator"] = value.attrs.get(
                "estimator", EXACT if is_exact else sampled(tokens.count, metric.estimator)
            )
            values[name] = value.dims, value.values, attrs
        return values, reasons

    def _nulls(
        self, counts: tuple[int, ...], group: LiveGroup, source: Quantities, names: Iterable[str]
    ) -> dict[str, Any]:
        """Nulls that are no constants, as ``NAME_null``; ``counts``: of the group and its tokens, by which most are known."""
        found: dict[str, Any] = {}
        if counts != self._counts:
            self._counts, self._known_nulls = counts, {}
        for metric in (CATALOGUE[name] for name in names):
            name = f"{metric.name}_null"
            if callable(metric.null) and name not in self._known_nulls:
                with suppress(Unavailable):  # such as that of shares, where the mixing matrix is not known
                    null = source.call(metric.null)
                    facts = metric.facts("expected of iid noise")
                    found[name] = *group.numbers(null.dims, null.values), facts
                    if set(inspect.signature(metric.null).parameters) <= OF_COUNTS:
                        self._known_nulls[name] = found[name]
        return self._known_nulls | found

    def _weights(
        self, group: LiveGroup, weights: WeightNorms | None
    ) -> tuple[dict[str, Number], dict[str, Any]]:
        """Norms and updates of the weights of a group, with the coordinates of its modules."""
        chains = self._session.structure.chains
        stages = [other for other in self.groups if other.number == group.number]
        starts = [other.depths[0] for other in stages]
        numbers, facts, coords = weight_variables(weights, chains, group.number, starts, stages.index(group))
        if not numbers:
            return {}, {}
        dataset = xr.Dataset(numbers | facts, coords)
        source = Quantities(dataset)
        found: dict[str, Number] = {}
        for metric in CATALOGUE.values():
            if metric.axis == "weight" and set(metric.roots) <= set(dataset):
                value = source.call(metric.function)
                attrs = {**value.attrs, "estimator": metric.estimator}
                found[metric.name] = value.dims, value.values, attrs
        return found, coords

    def _start(self, group: LiveGroup) -> dict[str, Number]:
        """Whether the weights of a group are as they were drawn; empty from the step on at which they are not."""
        if group.number in self._touched:  # weights do not come back, and to look at all of them takes time
            return {}
        if is_untouched(self._session.model, self._session.structure.chains[group.number]):
            return {"untouched": _number(1.0, "of the weights")}
        self._touched.add(group.number)
        return {}

    def _same_tokens(self, at: int, group: LiveGroup, sums: TokenSums) -> Number:
        """1 where the sampled positions are those of the first measured step, 0 where the batch has another shape or mask."""
        assert sums.live is not None
        positions = sums.live.places[group.depths[0]].position_K.cpu().numpy()
        if len(self._positions) <= at:
            self._positions.append(positions)
        return _number(float(np.array_equal(positions, self._positions[at])), "compared with the first row")


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


@lru_cache
def _applicable(names: tuple[str, ...], has_streams: bool) -> dict[str, Metric]:
    """Those metrics that have a meaning for a group: none of connections where there are no streams, none of weights."""
    found = {name: CATALOGUE[name] for name in names if CATALOGUE[name].axis != "weight"}
    of_streams = ("stream_cosine", "closest_stream_cosine")
    return {
        name: metric
        for name, metric in found.items()
        if has_streams or not (metric.axis == "connection" or name in of_streams)
    }


def _of_loss(measured: StepStatistics) -> dict[str, Number]:
    """The loss and what its verdicts judge; empty where no loss is known, of which NaN is no sign."""
    if measured.loss is None:
        return {}
    values = (measured.loss, float(not math.isfinite(measured.loss)), measured.loss_rise)
    return {
        name: _number(value, of["long_name"])
        # The largest rise so far is of all rows, and read off them.
        for (name, of), value in zip(OF_LOSSES.items(), values, strict=False)
    }


def _number(value: float, estimator: str, **attrs: Any) -> Number:
    return (), np.array(value), {**attrs, "estimator": estimator}


def _stamped(name: str, value: Number, group: LiveGroup) -> Number:
    """A value with the attributes of its metric, in the order of dims of an analysis."""
    dims, values, attrs = value
    facts = CATALOGUE[name].facts() if name in CATALOGUE else {"long_name": name.replace("_", " ")}
    if name in OF_LOSSES or (name in CATALOGUE and sums_of(name)):
        facts = {**facts, OF_SUMS: True}
    return *group.numbers(dims, values), {**facts, **attrs}


def _coords(group: LiveGroup, values: Numbers) -> dict[str, Any]:
    """Coordinates of every dim that some values have."""
    dims = {dim: size for of in values.values() for dim, size in zip(of[0], of[1].shape, strict=True)}
    known: dict[str, Any] = {
        **group.depth_coords,
        **group.connection_coords,
        "stream": np.array(group.streams),
    }
    known |= {dim: np.array(labels) for dim, labels in LABELS.items()}
    known |= {dim: np.array([label]) for dim, label in CHOSEN.items()}
    for dim, base in (("other_depth", "depth"), ("other_connection", "connection")):
        if base in known:
            known[dim] = known[base]
    found: dict[str, Any] = {}
    for name, value in known.items():
        of_dim, array = value if isinstance(value, tuple) else (name, value)
        if of_dim in dims and len(array) == dims[of_dim]:
            found[name] = ((of_dim,), array, {})
    return found
