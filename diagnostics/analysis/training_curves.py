"""How did training go, step by step? Metrics that the additive statistics over every token give exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import numpy as np
import xarray as xr

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.metrics import (
    attention,
    checkpoints,
    collapse,
    gradients,
    logits,
    mixing,
    propagation,
    streamed,
    weight_updates,
)
from depthscope.diagnostics.metrics.declaration import Metric
from depthscope.diagnostics.quantities.registry import Quantities, sources
from depthscope.diagnostics.quantities.token_spectra import RANKS
from depthscope.diagnostics.schema import POOLED_STEP, WITHOUT_GRADIENT, chain_dataset

EXACT = "exact over every token of the step"

OF_LOSSES = {
    "loss": {"long_name": "Loss", "units": "1", "symbol": r"\mathcal{L}"},
    "loss_not_finite": {"long_name": "Losses that are not finite", "units": "1"},
    "loss_rise": {"long_name": "Rise of the loss above its lowest, over the loss at the start", "units": "1"},
    "loss_spike": {"long_name": "Largest rise of the loss so far, over the loss at the start", "units": "1"},
}


def training_curves(run: xr.DataTree, *, chain: str = "") -> xr.Dataset:
    """Metrics by training step, from the additive statistics of a run.

    Parameters
    ----------
    run : DataTree
        A run with statistics.
    chain : str
        A name of `diagnostics.chains`, where there are several.

    Returns
    -------
    Dataset
        Under the names of the catalogue ``residual_norm``, ``gradient_norm``, ``backward_gain`` (step, depth,
        stream), ``token_cosine`` (over the data, all tokens, raw), ``adjacent_cosine`` (step, depth, stream),
        ``mixing_gain`` and ``logit_range`` (mean and max), the gradients at H_res and its logits (step, connection),
        ``attention_entropy`` and ``sink_mass`` (step, depth, head; of the sequences that were looked at), the metrics of
        `weight_updates` (step, weight) and of `checkpoints`, the ``streamed_`` ranks with their nulls; ``loss`` (step) with
        ``loss_not_finite`` and ``loss_rise``, which its verdicts judge, and
        ``connection_parameter_drift`` (step, parameter), how far each bias and gate of the connections has moved; as far
        as the statistics have them. Streamed sums are of the tokens since the weights last changed: their ranks are values of
        the last step and NaN before it.
        The stream ``mean`` of several streams is not in the statistics and NaN.

    Raises
    ------
    InputError
        Where the run has no statistics.
    """
    statistics = chain_dataset(run, "statistics", chain)
    if statistics is None:
        raise InputError(
            "the run has no statistics; record it with probes.record(...), or analyze a run with a trace"
        )
    return curves_of_sums(statistics, tuple(_CURVES))


def curves_of_sums(statistics: xr.Dataset, sums: Iterable[tuple[str, ...]]) -> xr.Dataset:
    """The curves that some of the sums give."""
    statistics = _with_stream_labels(statistics)
    curves: dict[str, xr.DataArray] = {}
    # A recording has the sums that were requested: a curve whose sums are missing is left out.
    for needs in sums:
        if all(name in statistics for name in needs):
            curves.update(_CURVES[needs](statistics))
    return xr.Dataset(curves)


def _with_stream_labels(statistics: xr.Dataset) -> xr.Dataset:
    """Streams under the labels of an analysis: ``mean``, and for several their numbers."""
    streams = statistics.sizes.get("stream", 0)
    if streams < 2:
        return statistics.assign_coords(stream=["mean"]) if streams else statistics
    # The norm of a mean is no sum over streams, so that the statistics cannot give it: NaN.
    labels = list(map(str, range(streams)))
    return statistics.assign_coords(stream=labels).reindex(stream=["mean", *labels])


def _exact(metric: Metric, value: xr.DataArray) -> xr.DataArray:
    return metric.stamp(value).assign_attrs(estimator=EXACT)


def _residual_norm(statistics: xr.Dataset) -> dict[str, xr.DataArray]:
    mean = statistics["square_norm_sum"] / statistics["token_count"]
    return {"residual_norm": _exact(gradients.residual_norm, mean**0.5)}


def _gradients(statistics: xr.Dataset) -> dict[str, xr.DataArray]:
    square = statistics["gradient_square_norm_sum"]
    norm = square**0.5
    if depths := square.attrs.get(WITHOUT_GRADIENT):
        norm = norm.assign_attrs({WITHOUT_GRADIENT: depths})
    last = norm.isel(depth=-1, drop=True)
    gain = (norm / last.where(last > 0)).transpose(*norm.dims)
    return {
        "gradient_norm": _exact(gradients.gradient_norm, norm),
        "backward_gain": _exact(gradients.backward_gain, gain),
    }


def _token_cosine(statistics: xr.Dataset) -> dict[str, xr.DataArray]:
    count = statistics["token_count"]
    # Σ_{i≠j} u_i · u_j over all ordered pairs, divided by their number.
    cosine = statistics["unit_pair_sum"] / (count * (count - 1)).where(count > 1)
    # The labels of this variant in an analysis, so that a curve and a trace can be compared.
    labelled = cosine.transpose("step", "depth", "stream").expand_dims(
        scope=["data"], tokens=["all"], centering=["raw"]
    )
    ordered = labelled.transpose("step", "scope", "tokens", "centering", "depth", "stream")
    return {"token_cosine": _exact(collapse.token_cosine, ordered)}


def _adjacent_cosine(statistics: xr.Dataset) -> dict[str, xr.DataArray]:
    cosine = statistics["adjacent_cosine_sum"] / statistics["token_count"]
    return {
        "adjacent_cosine": _exact(propagation.adjacent_cosine, cosine.transpose("step", "depth", "stream"))
    }


def _mixing_gain(statistics: xr.Dataset) -> dict[str, xr.DataArray]:
    # No quantiles, which sums over batches cannot give.
    parts = [statistics["gain_sum"] / statistics["token_count"], statistics["gain_max"]]
    gain = xr.concat(parts, xr.Variable("reduction", ["mean", "max"]), coords="minimal", compat="override")
    gain = gain.assign_coords(direction=list(mixing.DIRECTIONS))
    return {
        "mixing_gain": _exact(
            mixing.mixing_gain, gain.transpose("step", "direction", "connection", "reduction")
        )
    }


def _logit_range(statistics: xr.Dataset) -> dict[str, xr.DataArray]:
    parts = [statistics["logit_range_sum"] / statistics["logit_token_count"], statistics["logit_range_max"]]
    found = xr.concat(parts, xr.Variable("reduction", ["mean", "max"]), coords="minimal", compat="override")
    return {"logit_range": _exact(logits.logit_range, found.transpose("step", "connection", "reduction"))}


def _logit_gradients(statistics: xr.Dataset) -> dict[str, xr.DataArray]:
    norms = [statistics[f"{name}_gradient_square_sum"] ** 0.5 for name in ("logit", "mixing")]
    return {
        metric.name: _exact(metric, cast(xr.DataArray, metric.function(*needed)))
        for metric, needed in (
            (logits.logit_gradient, norms[:1]),
            (logits.mixing_gradient, norms[1:]),
            (logits.logit_gradient_share, norms),
        )
    }


def _attention(statistics: xr.Dataset) -> dict[str, xr.DataArray]:
    count = statistics["attention_query_count"]
    heads = {"head": range(count.sizes["head"])}
    return {
        metric.name: _exact(
            metric, (statistics[f"{metric.name}_sum"] / count.where(count > 0)).assign_coords(heads)
        )
        for metric in (attention.attention_entropy, attention.sink_mass)
    }


def losses(statistics: xr.Dataset) -> dict[str, xr.DataArray]:
    """What is known of the loss, by step; no metric of the catalogue, since it has no place in the network."""
    known = {name: statistics[name] for name in OF_LOSSES if name in statistics}
    if "loss_rise" in known:
        rises = known["loss_rise"]
        known["loss_spike"] = rises.copy(
            data=np.fmax.accumulate(rises.values, axis=rises.get_axis_num("step"))
        )
    return {name: value.assign_attrs(OF_LOSSES[name]) for name, value in known.items()}


def _streamed_ranks(statistics: xr.Dataset) -> dict[str, xr.DataArray]:
    source = Quantities(sources(xr.Dataset(), statistics))  # of a run that may have no trace
    found: dict[str, xr.DataArray] = {}
    for name in RANKS:
        found |= getattr(streamed, f"streamed_{name}").evaluate(source)
    # Sums since the weights last changed are of the last weights: no other step has a value.
    steps = statistics["step"].values
    last = [statistics.attrs.get(POOLED_STEP, steps[-1])]
    return {
        name: value if name.endswith("_null") else value.expand_dims(step=last).reindex(step=steps)
        for name, value in found.items()
    }


def _of_all_steps(metric: Metric, statistics: xr.Dataset) -> dict[str, xr.DataArray]:
    # The function itself, on all steps at once: `Quantities` of an analysis have the last one only.
    value = metric.function(*(statistics[name] for name in metric.needs))
    assert isinstance(value, xr.DataArray)  # without an error
    return {metric.name: metric.stamp(value)}


_OF_ALL_STEPS = (
    weight_updates.weight_norm,
    weight_updates.weight_gradient_norm,
    weight_updates.weight_gradient_ratio,
    weight_updates.update_ratio,
    # Of a history of checkpoints.
    checkpoints.first_weight_distance,
    checkpoints.first_checkpoint_cka,
    checkpoints.last_checkpoint_cka,
    checkpoints.first_checkpoint_distance,
)


def _parameter_drift(statistics: xr.Dataset) -> dict[str, xr.DataArray]:
    """‖p − p₀‖ of each bias or gate p of the connections, p₀ from the first step that measured it."""
    values = statistics["connection_parameter"].transpose("step", "cell").values.astype(np.float64)
    owner = statistics["cell_parameter"].values.astype(object).astype(str)
    names = list(dict.fromkeys(owner))
    # Steps before a parameter was measured are NaN, and so is their drift.
    first = np.take_along_axis(values, np.isfinite(values).argmax(0)[None], axis=0)
    moved = np.square(values - first)
    drift = np.stack([np.sqrt(moved[:, owner == name].sum(1)) for name in names], axis=1)
    coords = {"step": statistics["step"], "parameter": np.array(names, dtype=object)}
    return {"connection_parameter_drift": xr.DataArray(drift, coords, ("step", "parameter"))}


_STREAMED = ("eigenvalue", "stream_eigenvalue", "streamed_count")
_CURVES: dict[tuple[str, ...], Callable[[xr.Dataset], dict[str, xr.DataArray]]] = {
    ("square_norm_sum", "token_count"): _residual_norm,
    ("gradient_square_norm_sum",): _gradients,
    ("unit_pair_sum", "token_count"): _token_cosine,
    ("adjacent_cosine_sum", "token_count"): _adjacent_cosine,
    ("gain_sum", "gain_max", "token_count"): _mixing_gain,
    ("logit_range_sum", "logit_range_max", "logit_token_count"): _logit_range,
    ("logit_gradient_square_sum", "mixing_gradient_square_sum"): _logit_gradients,
    ("attention_entropy_sum", "sink_mass_sum", "attention_query_count"): _attention,
    ("connection_parameter",): _parameter_drift,
    **{(name,): losses for name in OF_LOSSES},
    _STREAMED: _streamed_ranks,
    **{metric.needs: partial(_of_all_steps, metric) for metric in _OF_ALL_STEPS},
}

STEPWISE_SUMS = tuple(needs for needs in _CURVES if needs != _STREAMED)
"""Sums that belong together, each group of which gives curves with a number at every step; a step needs no other one, except
for drifts, which are from the first step on."""
