"""What is the row of one measured step? Every live metric by its place in the run, as plain arrays."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.analysis.training_curves import OF_LOSSES, sums_of
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.metrics.declaration import Metric
from depthscope.diagnostics.quantities.exact_sums import EXACT
from depthscope.diagnostics.quantities.registry import CHOICES, LABELS, Quantities, Unavailable
from depthscope.diagnostics.schema.variables import OF_SUMS
from depthscope.probes.run.connection_variables import weight_variables
from depthscope.probes.run.initial_weights import is_untouched
from depthscope.probes.run.statistics_dataset import StepStatistics
from depthscope.probes.session.session import Session
from depthscope.probes.statistics.token_sums import TokenSums
from depthscope.probes.statistics.weight_updates import WeightNorms
from depthscope.probes.training.live.exact_quantities import EXACT_QUANTITIES, LiveGroup, exact_quantities
from depthscope.probes.training.live.sampled_quantities import CHOSEN, SampledTokens, sampled

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

Number = tuple[tuple[Any, ...], np.ndarray, Mapping[str, Any]]
Numbers = Mapping[str, Number]
"""Dims, values and attributes by name."""


@dataclass(frozen=True)
class LiveRow:
    """The metrics of one measured step."""

    step: int  # of the training
    # by ``metrics/NAME`` or ``metrics/CHAIN/NAME``; float64, of the same shapes at every step, dims without
    # ``step``
    numbers: Numbers
    coords: Numbers  # coordinates by the same kind of path, and nulls, which have no step
    # why metrics have no value, by chain and metric
    not_computed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class LiveMetrics:
    """Computes the row of each measured step.

    ``session``: whose forwards are measured.
    ``names``: metrics of the catalogue.
    """

    def __init__(self, session: Session, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.groups: list[LiveGroup] = []
        self._session = session
        self._positions: list[np.ndarray] = []  # of the first step
        self._counts: tuple[int, ...] = ()
        self._known_nulls: dict[str, Any] = {}
        self._touched: set[int] = set()  # chains whose weights are not as initialisers leave them any more

    def row(
        self, sums: Sequence[TokenSums], measured: StepStatistics, learning_rate: float | None
    ) -> LiveRow:
        """The row of a step.

        ``sums``: of the step, by chain, in the memory of the host.
        ``measured``: the row of statistics of the same step.
        ``learning_rate``: that the optimizer made the step with.
        """
        numbers: dict[str, Any] = {}
        coords: dict[str, Any] = {}
        not_computed: dict[str, dict[str, str]] = {}
        for at, group in enumerate(self.groups):
            more, more_coords = self._weights(group, measured.weights)
            more |= self._start(group) | _of_loss(measured)
            more["same_sampled_tokens"] = self._same_tokens(at, group, sums[group.number])
            if learning_rate is not None:
                how = "of the first group of the optimizer's parameters"
                more["learning_rate"] = _number(learning_rate, how)
            tokens = SampledTokens(sums[group.number], group, each_stream=self.names != LIVE)
            source = tokens.source(exact_quantities(sums[group.number], group))
            values, reasons = self._measure(group, tokens, source)
            stamped = {name: _stamped(name, of, group) for name, of in (values | more).items()}
            counts = at, tokens.count, int(tokens.massive_K.sum())
            nulls = self._nulls(counts, group, source, values)
            numbers |= {group.path(name): of for name, of in stamped.items()}
            for name, part in (_coords(group, stamped) | more_coords | nulls).items():
                coords[group.path(name)] = part
            not_computed[group.chain] = reasons
        return LiveRow(measured.step, numbers, coords, not_computed)

    def _measure(
        self, group: LiveGroup, tokens: SampledTokens, source: Quantities
    ) -> tuple[dict[str, Number], dict[str, str]]:
        """Values by name with their estimator, and why other metrics have none."""
        values: dict[str, Number] = {}
        reasons: dict[str, str] = {}
        for name, metric in _applicable(self.names, bool(group.connections)).items():
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
