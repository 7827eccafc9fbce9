"""What is the row of one measured step? Every live metric by its place in the run, as plain arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import xarray as xr

from depthscope.diagnostics.analysis.training_curves import OF_LOSSES
from depthscope.diagnostics.metrics import weight_updates
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.quantities.registry import DIMS, LABELS
from depthscope.probes.run.initial_weights import YOUNG, start_facts
from depthscope.probes.run.statistics_dataset import StepStatistics
from depthscope.probes.run.weight_variables import weight_variables
from depthscope.probes.session.session import Session
from depthscope.probes.statistics.token_sums import TokenSums
from depthscope.probes.statistics.weight_updates import WeightNorms
from depthscope.probes.training.live import every_token
from depthscope.probes.training.live.group import LiveGroup
from depthscope.probes.training.live.live_value import LiveValue, sampled
from depthscope.probes.training.live.sampled_tokens import CHOSEN, OF_CONNECTIONS, OF_MEAN, SampledTokens

OF_LOGITS = (
    *("logit_range", "logit_saturation", "logit_gradient", "mixing_gradient", "logit_gradient_share"),
)
LIVE = (
    *(
        "residual_norm",
        "gradient_norm",
        "backward_gain",
        "relative_gradient",
        "adjacent_cosine",
        "token_cosine",
    ),
    *("massive_token_fraction", "massive_activation", "stream_cosine", "closest_stream_cosine"),
    *("mixing_gain", "composite_gain", "read_share", "write_share"),
    *OF_LOGITS,
    *OF_MEAN,
    *OF_CONNECTIONS,
)
"""Metrics of ``metrics="live"``, with ranks in the mean over streams alone."""

Begun = tuple[dict[str, LiveValue], dict[str, Any]]
"""Values of a group, and coordinates of theirs."""

Numbers = Mapping[str, tuple[tuple[str, ...], np.ndarray, Mapping[str, Any]]]


@dataclass(frozen=True)
class LiveRow:
    """The metrics of one measured step.

    Parameters
    ----------
    step : int
        Of the training.
    numbers : mapping of str to (dims, ndarray, attributes)
        By ``metrics/NAME`` or ``metrics/CHAIN/NAME``; float64, of the same shapes at every step, dims without ``step``.
    coords : mapping of str to (dims, ndarray, attributes)
        Coordinates by the same kind of path, and nulls, which have no step.
    not_computed : mapping of str to mapping
        Why metrics have no value, by chain and metric.
    """

    step: int
    numbers: Numbers
    coords: Numbers
    not_computed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class LiveMetrics:
    """Computes the row of each measured step.

    Parameters
    ----------
    session : Session or None
        Whose forwards are measured; None where rows are completed that another process began.
    names : sequence of str
        Metrics of the catalogue.
    """

    def __init__(self, session: Session | None, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.groups: list[LiveGroup] = []
        self._session = session
        self._positions: list[np.ndarray] = []  # of the first step
        self._grown: set[int] = set()  # chains that have left their start
        self._small_starts: dict[str, str] = {}  # why branches are small, as it was said first
        self._known_nulls: dict[tuple[int, int, int], dict[str, xr.DataArray]] = {}

    def begin(
        self, sums: Sequence[TokenSums], measured: StepStatistics, learning_rate: float | None
    ) -> list[Begun]:
        """What of a row costs nothing and needs the session, by group.

        ``measured``: the row of statistics of the same step.
        ``learning_rate``: that the optimizer made the step with.
        """
        found = []
        for at, group in enumerate(self.groups):
            values, coords = self._weights(group, measured.weights)
            values |= self._start(group) | _of_loss(measured)
            values["same_sampled_tokens"] = self._same_tokens(at, group, sums[group.number])
            if learning_rate is not None:
                how = "of the first group of the optimizer's parameters"
                values["learning_rate"] = _number(learning_rate, how)
            found.append((values, coords))
        return found

    def complete(self, step: int, sums: Sequence[TokenSums], begun: Sequence[Begun]) -> LiveRow:
        """Measure the rest of a row that `begin` began."""
        numbers: dict[str, Any] = {}
        coords: dict[str, Any] = {}
        not_computed: dict[str, dict[str, str]] = {}
        for at, (group, (more, more_coords)) in enumerate(zip(self.groups, begun, strict=True)):
            values, nulls, reasons = self._measure(at, group, sums[group.number])
            values = values | more
            numbers |= {group.path(name): _stamped(name, of) for name, of in values.items()}
            for name, part in (group_coords(group, values) | more_coords).items():
                coords[group.path(name)] = part
            coords |= {group.path(name): (null.dims, null.values, null.attrs) for name, null in nulls.items()}
            not_computed[group.chain] = reasons
        return LiveRow(step, numbers, coords, not_computed)

    def _measure(
        self, at: int, group: LiveGroup, sums: TokenSums
    ) -> tuple[dict[str, LiveValue], dict[str, xr.DataArray], dict[str, str]]:
        live = sums.live
        assert live is not None
        tokens = SampledTokens(live, group)
        found = every_token.state_metrics(sums, group.depths, group.cut) | tokens.relative_gradient()
        if set(OF_MEAN) & set(self.names):
            found |= tokens.mean_states(each_stream=self.names != LIVE)
        found |= every_token.stream_metrics(live, group.depths)
        found |= every_token.massive_tokens(
            live,
            group.depths,
            tokens.medians_LV,
            np.array([float(sums.sums["token_count"][depth]) for depth in group.depths]),
            sampled(tokens.count),
        )
        if group.connections:
            found |= every_token.share_metrics(live, group.connections)
            logits = every_token.logit_metrics(sums, group.connections, group.transposed)
            found |= logits
            if "logit_range" in logits and "logit_saturation" in self.names:
                found |= tokens.saturation()
            found |= tokens.connections() if set(OF_CONNECTIONS) & set(self.names) else {}
            if group.mixes_known:
                found |= every_token.gain_metrics(live, group.connections, group.transposed)
        found = {name: value for name, value in found.items() if name in self.names}
        others = [name for name in self.names if name not in LIVE and _applies(name, group)]
        values, nulls, reasons = tokens.measure(others)
        lost = [name for name in self.names if name in LIVE and name not in found and _applies(name, group)]
        reasons |= dict.fromkeys(lost, NOT_SHOWN)
        return found | values, nulls | self._nulls(at, tokens), reasons

    def _nulls(self, at: int, tokens: SampledTokens) -> dict[str, xr.DataArray]:
        """Nulls of what was computed in the mean over streams; they depend on the numbers of tokens alone."""
        wanted = [name for name in OF_MEAN if name in self.names]
        numbers = at, tokens.count, int(tokens.massive_K.sum())
        if wanted and numbers not in self._known_nulls:
            self._known_nulls = {numbers: tokens.nulls(wanted)}
        return self._known_nulls.get(numbers, {})

    def _weights(
        self, group: LiveGroup, weights: WeightNorms | None
    ) -> tuple[dict[str, LiveValue], dict[str, Any]]:
        """Norms and updates of the weights of a group, with the coordinates of its modules."""
        assert self._session is not None
        chains = self._session.structure.chains
        stages = [other for other in self.groups if other.number == group.number]
        starts = [other.depths[0] for other in stages]
        variables, coords = weight_variables([weights], chains, group.number, starts, stages.index(group))
        if not variables:
            return {}, {}
        dataset = xr.Dataset(variables, coords).isel(step=0)
        found = {}
        for metric in WEIGHTS:
            value = cast(xr.DataArray, metric.function(*(dataset[name] for name in metric.needs)))
            found[metric.name] = LiveValue(("weight",), value.values, metric.estimator, value.attrs)
        return found, {
            "weight": (("weight",), coords["weight"], {}),
            "weight_layer": (("weight",), coords["weight_layer"][1], {}),
        }

    def _start(self, group: LiveGroup) -> dict[str, LiveValue]:
        """Whether the blocks of a group are still near their start at this step; empty once they have left it."""
        assert self._session is not None
        if group.number in self._grown:
            return {}
        facts = start_facts(self._session.model, self._session.structure.chains[group.number])
        if not facts or facts.get("norms_moved", 0.0) > YOUNG:
            # Weights do not come back, and to look at all of them at every step would cost a small model as much as the step.
            self._grown.add(group.number)
        found = {
            name: _number(float(facts[name]), "of the weights") for name in facts if name != "small_start"
        }
        if "small_start" in facts:  # a sentence, whose numbers would differ from row to row
            sentence = self._small_starts.setdefault(group.chain, facts["small_start"])
            found["small_start"] = LiveValue((), np.array(1.0), "of the weights", {"sentence": sentence})
        return found

    def _same_tokens(self, at: int, group: LiveGroup, sums: TokenSums) -> LiveValue:
        """1 where the sampled positions are those of the first measured step, 0 where the batch has another shape or mask."""
        assert sums.live is not None
        positions = sums.live.places[group.depths[0]].position_K.cpu().numpy()
        if len(self._positions) <= at:
            self._positions.append(positions)
        return _number(float(np.array_equal(positions, self._positions[at])), "compared with the first row")


# Such as gradients that were not asked for, or read weights that no tensor of the model shows.
NOT_SHOWN = "what it needs was not seen in the step"


def _applies(name: str, group: LiveGroup) -> bool:
    """Whether a metric has a meaning for the group: none of connections where there are no streams, none of weights."""
    of_streams = CATALOGUE[name].axis == "connection" or name in ("stream_cosine", "closest_stream_cosine")
    return CATALOGUE[name].axis != "weight" and (bool(group.connections) or not of_streams)


WEIGHTS = (
    weight_updates.weight_norm,
    weight_updates.weight_gradient_norm,
    weight_updates.weight_gradient_ratio,
    weight_updates.update_ratio,
)


def _of_loss(measured: StepStatistics) -> dict[str, LiveValue]:
    """The loss and what its verdicts judge; empty where no loss is known, of which NaN is no sign."""
    if measured.loss is None:
        return {}
    values = (measured.loss, float(not math.isfinite(measured.loss)), measured.loss_rise)
    return {
        name: _number(value, of["long_name"])
        # The largest rise so far is of all rows, and read off them.
        for (name, of), value in zip(OF_LOSSES.items(), values, strict=False)
    }


def _number(value: float, estimator: str) -> LiveValue:
    return LiveValue((), np.array(value), estimator)


def _stamped(name: str, of: LiveValue) -> tuple[tuple[str, ...], np.ndarray, Mapping[str, Any]]:
    """A value with the attributes of its metric, in the order of dims of an analysis."""
    dims = tuple(sorted(of.dims, key=DIMS.index))
    values = np.transpose(of.values, [of.dims.index(dim) for dim in dims])
    if name not in CATALOGUE:
        return dims, values, {"long_name": name.replace("_", " "), **of.attrs, "estimator": of.estimator}
    return dims, values, {**CATALOGUE[name].facts(), **of.attrs, "estimator": of.estimator}


def group_coords(group: LiveGroup, values: Mapping[str, LiveValue]) -> dict[str, Any]:
    """Coordinates of every dim that some values have."""
    dims = {dim: size for of in values.values() for dim, size in zip(of.dims, of.values.shape, strict=True)}
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
