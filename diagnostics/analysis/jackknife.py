"""How far would a number move with other sequences? Its jackknife standard error, one sequence left out at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.diagnostics.metrics.declaration import Metric
from depthscope.diagnostics.quantities.registry import Quantities, Unavailable
from depthscope.diagnostics.quantities.tokens import evenly_spaced

# Leaving out one at a time is wrong for quantiles and extremes, however many sequences there are (Efron 1979).
ROUGH = ("median", "p1", "p99", "max")


def jackknife(
    trace: xr.Dataset, metrics: Iterable[Metric], report: Callable[[str], None] = lambda name: None
) -> dict[str, xr.DataArray]:
    r"""Standard errors of metrics over pooled tokens, by leaving out one sequence at a time.

    .. math:: \mathrm{se}^2 = \tfrac{S - 1}{S} \textstyle\sum_s \big(\theta_{(s)} - \overline{\theta_{(\cdot)}}\big)^2

    Whole sequences are left out, because their tokens depend on each other (Künsch 1989), and none is drawn twice
    as the bootstrap would: a repeated token lowers ranks and is its own nearest neighbour. Of a plain mean
    it is the usual standard error; of smooth statistics it is, on average, rather too large than too small
    (Efron & Stein 1981). Each sequence costs about one more analysis of the pooled tokens.

    Parameters
    ----------
    trace : Dataset
        The chain's trace.
    metrics : iterable of Metric
        Those that are not `smooth`, or rest on no sequences, get no error.
    report : function, optional
        Called with "jackknife" before each sequence.

    Returns
    -------
    dict of str to DataArray
        Standard errors by name of the metric; at the scope ``data`` alone where it has scopes. None with fewer than
        two sequences that hold tokens.
    """
    masks = list(_without_each(trace))
    wanted = [metric for metric in metrics if resampled(metric)]
    found: dict[str, list[xr.DataArray]] = {metric.name: [] for metric in wanted}
    for left in masks:
        report("jackknife")
        for limit, group in _by_limit(wanted, trace).items():
            source = Quantities(trace.assign(mask=left & _thinned(trace, limit)), choices={"scope": "data"})
            for metric in group:
                found[metric.name] += _value(metric, source)
    return {name: _error(values) for name, values in found.items() if len(values) == len(masks) > 1}


def num_replicas(trace: xr.Dataset) -> int:
    """How many times the jackknife measures: once for each sequence that holds tokens, if it is not alone.

    Parameters
    ----------
    trace : Dataset
        The chain's trace.

    Returns
    -------
    int
    """
    held = int(_mask(trace).any("token").sum())
    return held if held > 1 else 0


def resampled(metric: Metric) -> bool:
    """Whether leaving out sequences says how sure a metric is.

    Parameters
    ----------
    metric : Metric
        Any.

    Returns
    -------
    bool
        False for what is not `smooth` and for what does not rest on sampled sequences.
    """
    known = [schema.TRACE[root].dims for root in metric.roots if root in schema.TRACE]
    return metric.smooth and any("sample" in dims for dims in known)


def _mask(trace: xr.Dataset) -> xr.DataArray:
    return Quantities(trace)["mask"].transpose("sample", "token")


def _without_each(trace: xr.Dataset) -> Iterator[xr.DataArray]:
    """The mask with one sequence left out, for each that holds tokens; nothing where there is but one."""
    mask = _mask(trace)
    held = np.flatnonzero(mask.values.any(axis=1))
    for sequence in held if len(held) > 1 else ():
        left = mask.copy(deep=True)
        left.values[sequence] = False
        yield left


def _by_limit(metrics: Iterable[Metric], trace: xr.Dataset) -> dict[int | None, list[Metric]]:
    """Metrics by the most tokens that they take, so that all are measured on tokens chosen once."""
    groups: dict[int | None, list[Metric]] = {}
    for metric in metrics:
        limit = None if metric.most_tokens is None else metric.most_tokens(trace.sizes.get("feature", 1))
        groups.setdefault(limit, []).append(metric)
    return groups


def _thinned(trace: xr.Dataset, limit: int | None) -> xr.DataArray:
    """The mask of at most so many tokens, those that the metric itself would take of all sequences."""
    mask = _mask(trace)
    if limit is None:
        return mask
    real = np.argwhere(mask.values)
    kept = np.zeros(mask.shape, dtype=bool)
    kept[tuple(real[evenly_spaced(len(real), limit)].T)] = True
    return mask.copy(data=kept)


def _value(metric: Metric, source: Quantities) -> list[xr.DataArray]:
    """The value as a list of one, or none where the sequences left do not give it."""
    try:
        return [metric.measure(source)[0]]
    except Unavailable:
        return []


def _error(values: list[xr.DataArray]) -> xr.DataArray:
    """The standard error from the values without each sequence; NaN for rough reductions."""
    apart = np.stack([value.values for value in values])
    apart = apart - apart.mean(axis=0)
    error = values[0].copy(data=np.sqrt((apart**2).sum(axis=0) * (len(values) - 1) / len(values)))
    if "reduction" in error.dims:
        error = error.where(~error["reduction"].isin(ROUGH))
    return error.assign_attrs(estimator=f"delete-one jackknife over {len(values)} sequences")
