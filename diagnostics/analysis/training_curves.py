"""How did training go, step by step? Metrics that the additive statistics over every token give exactly."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.quantities.exact_sums import BY_SUMS, EXACT, ONE_VARIANT
from depthscope.diagnostics.quantities.registry import Quantities, roots
from depthscope.diagnostics.schema import STATISTICS, chain_dataset

DRIFT = "connection_parameter_drift"
OF_LOSSES = {
    "loss": {"long_name": "Loss", "units": "1", "symbol": r"\mathcal{L}"},
    "loss_not_finite": {"long_name": "Losses that are not finite", "units": "1"},
    "loss_rise": {"long_name": "Rise of the loss above its lowest, over the loss at the start", "units": "1"},
    "unmoved_steps": {"long_name": "Measured steps so far, where no weight has moved in them", "units": "1"},
}
OF_WEIGHTS = ("weight_square_norm", "weight_gradient_square_norm")


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
        ``mixing_gain`` (mean and max),
        ``attention_entropy`` and ``sink_mass`` (step, depth, head; of the sequences that were looked at), the metrics of
        `weight_updates` (step, weight) and of `checkpoints`; ``loss`` (step) with
        ``loss_not_finite`` and ``loss_rise``, which its verdicts judge, and
        ``connection_parameter_drift`` (step, parameter), how far each bias and gate of the connections has moved; as far
        as the statistics have them.
        The stream ``mean`` of several streams is not in the statistics and NaN.

    Raises
    ------
    InputError
        Where the run has no statistics.
    """
    statistics = chain_dataset(run, "statistics", chain)
    if statistics is None:
        raise InputError(
            "the run has no statistics; record it with ds.record(...), or analyze a run with a trace"
        )
    return curves_of_sums(statistics)


def sums_of(curve: str) -> tuple[str, ...]:
    """The sums that a curve is computed from, of its own step alone, except for drifts, which are from the first step on."""
    others = {
        DRIFT: ("connection_parameter",),
        "unmoved_steps": OF_WEIGHTS,
    }
    return _sums_of(CATALOGUE[curve].function) if curve in CATALOGUE else others.get(curve, (curve,))


@lru_cache(maxsize=1024)
def _sums_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The sums that feed a metric; empty where they do not."""
    needs = roots(function, BY_SUMS)
    return needs if set(needs) <= STATISTICS.keys() else ()


def curves_of_sums(statistics: xr.Dataset) -> xr.Dataset:
    """The curves that the sums of a dataset give: a recording has the sums that were requested."""
    source = Quantities(_with_stream_labels(statistics), choices=ONE_VARIANT, supplied=BY_SUMS)
    curves: dict[str, xr.DataArray] = {}
    for name in CATALOGUE:
        needs = sums_of(name)
        if needs and all(each in statistics for each in needs):
            curves[name] = _curve(name, source)
    if "connection_parameter" in statistics:
        curves |= _parameter_drift(statistics)
    return xr.Dataset(curves | losses(statistics))


def _curve(name: str, source: Quantities) -> xr.DataArray:
    metric = CATALOGUE[name]
    found = metric.stamp(metric.unfolded(source)).transpose("step", *metric.dims)
    # What modules own is exact in any case.
    return found.assign_attrs(estimator=EXACT) if set(metric.needs) & BY_SUMS.keys() else found


def _with_stream_labels(statistics: xr.Dataset) -> xr.Dataset:
    """Streams under the labels of an analysis: ``mean``, and for several their numbers."""
    streams = statistics.sizes.get("stream", 0)
    if streams < 2:
        return statistics.assign_coords(stream=["mean"]) if streams else statistics
    # The norm of a mean is no sum over streams, so that the statistics cannot give it: NaN.
    labels = list(map(str, range(streams)))
    return statistics.assign_coords(stream=labels).reindex(stream=["mean", *labels])


def losses(statistics: xr.Dataset) -> dict[str, xr.DataArray]:
    """What is known of the loss and of all weights, by step; no metrics of the catalogue, since they have no place."""
    known = {name: statistics[name] for name in OF_LOSSES if name in statistics}
    if set(OF_WEIGHTS) <= statistics.keys():
        known["unmoved_steps"] = _unmoved_steps(*(statistics[name] for name in OF_WEIGHTS))
    return {name: value.assign_attrs(OF_LOSSES[name]) for name, value in known.items()}


def _unmoved_steps(norms: xr.DataArray, gradients: xr.DataArray) -> xr.DataArray:
    """How many steps so far had a gradient, where every weight norm is still the first one to the last bit; else 0."""
    least, most = (extreme.accumulate(norms.values, axis=0) for extreme in (np.fmin, np.fmax))
    moved = xr.DataArray(((least != most) & ~np.isnan(least)).any(axis=1), dims="step")
    return (gradients > 0).any("weight").cumsum("step").where(~moved, 0).astype(float)


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
    return {DRIFT: xr.DataArray(drift, coords, ("step", "parameter"))}
