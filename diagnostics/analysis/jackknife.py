"""How far would a number move with other sequences? Its jackknife standard error, one sequence left out at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import numpy as np
import xarray as xr

from depthscope.diagnostics.metrics.declaration import Metric
from depthscope.diagnostics.quantities.over_sequences import DEGREES
from depthscope.diagnostics.quantities.registry import LABELS, Quantities, Unavailable
from depthscope.diagnostics.quantities.tokens import evenly_spaced
from depthscope.diagnostics.schema import TRACE

# Leaving out one at a time is wrong for quantiles and extremes, however many sequences there are (Efron 1979).
ROUGH = ("median", "p1", "p99", "max")


def jackknife(
    trace: xr.Dataset, metrics: Iterable[Metric], report: Callable[[str], None] = lambda name: None
) -> dict[str, xr.Variable]:
    r"""Standard errors of metrics over pooled tokens, by leaving out one sequence at a time.

    .. math:: \mathrm{se}^2 = \tfrac{S - 1}{S} \textstyle\sum_s \big(\theta_{(s)} - \overline{\theta_{(\cdot)}}\big)^2

    Whole sequences are left out, because their tokens depend on each other (Künsch 1989), and none is drawn twice
    as the bootstrap would: a repeated token lowers ranks and is its own nearest neighbour. Of a plain mean
    it is the usual standard error; of smooth statistics it is, on average, rather too large than too small
    (Efron & Stein 1981). Each sequence costs about one more analysis of the pooled tokens.

    ``metrics``: those that are not `smooth`, or do not come from sequences, get no error.
    Returns: Standard errors by name of the metric; at the scope ``data`` only where it has scopes. None with fewer than
    two sequences that have tokens.
    """
    # A metric that some replica could not give has no error: those that could are not a fair sample.
    return {name: _jackknife_error(values) for name, values in replicas(trace, metrics, report).items()}


def replicas(
    trace: xr.Dataset, metrics: Iterable[Metric], report: Callable[[str], None] = lambda name: None
) -> dict[str, list[xr.Variable]]:
    """Metrics over pooled tokens without each sequence in turn.

    ``metrics``: those that `resampled` refuses are left out.
    Returns: By name of the metric, one value for each sequence that has tokens; without metrics that fewer sequences
    cannot feed.
    """
    masks = list(_without_each(trace))
    wanted = [metric for metric in metrics if resampled(metric)]
    found: dict[str, list[xr.Variable]] = {metric.name: [] for metric in wanted}
    for mask in masks:
        report("jackknife")
        for limit, group in _by_limit(wanted, trace).items():
            # Means over sequences have their errors already: only pooled tokens are measured again.
            source = Quantities(
                trace.assign(mask=mask & _thinned_mask(trace, limit)), choices={"scope": "data"}
            )
            for metric in group:
                with suppress(Unavailable):  # the remaining sequences may be too few for it
                    found[metric.name].append(metric.measure(source)[0])
    return {name: values for name, values in found.items() if len(values) == len(masks) > 1}


def num_replicas(trace: xr.Dataset) -> int:
    """How many times the jackknife measures: once for each sequence that has tokens, of two or more."""
    num_sequences = int(_mask(trace).any("token").sum())
    return num_sequences if num_sequences > 1 else 0


def resampled(metric: Metric) -> bool:
    """Whether leaving out sequences estimates the error of a metric.

    Returns: False for what is not `smooth` and for what does not come from sampled sequences.
    """
    # Statistics are of every token of the training: no sequence of them was sampled.
    known = [TRACE[root].dims for root in metric.roots if root in TRACE]
    return metric.smooth and any("sample" in dims for dims in known)


def _mask(trace: xr.Dataset) -> xr.DataArray:
    # By the quantities, which make a mask where the trace has none.
    return Quantities(trace)["mask"].transpose("sample", "token")


def _without_each(trace: xr.Dataset) -> Iterator[xr.DataArray]:
    """The mask without one sequence, for each that has tokens; nothing where there is only one."""
    mask = _mask(trace)
    if num_replicas(trace) == 0:
        return
    for sequence in np.flatnonzero(mask.values.any(axis=1)):
        without = mask.copy(deep=True)
        without.values[sequence] = False
        yield without


def _by_limit(metrics: Iterable[Metric], trace: xr.Dataset) -> dict[int | None, list[Metric]]:
    """Metrics by the most tokens that they use, so that each limit needs one thinned mask."""
    groups: dict[int | None, list[Metric]] = {}
    for metric in metrics:
        limit = None if metric.most_tokens is None else metric.most_tokens(trace.sizes.get("feature", 1))
        groups.setdefault(limit, []).append(metric)
    return groups


def _thinned_mask(trace: xr.Dataset, limit: int | None) -> xr.DataArray:
    """The mask of at most so many tokens, those that the metric itself would use of all sequences.

    Chosen before a sequence is left out: a choice from the rest would be other tokens, and the difference their error too.
    """
    mask = _mask(trace)
    if limit is None:
        return mask
    real = np.argwhere(mask.values)
    chosen = np.zeros(mask.shape, dtype=bool)
    chosen[tuple(real[evenly_spaced(len(real), limit)].T)] = True
    return mask.copy(data=chosen)


def _jackknife_error(values: list[xr.Variable]) -> xr.Variable:
    """The standard error from the values without each sequence; NaN for rough reductions."""
    replicas = np.stack([value.values for value in values])
    squares = ((replicas - replicas.mean(axis=0)) ** 2).sum(axis=0)
    # (S − 1)/S and not 1/(S − 1): two replicas differ in one sequence of each only, so that their spread is small.
    error = values[0].copy(data=np.sqrt(squares * (len(values) - 1) / len(values)))
    if "reduction" in error.dims:
        is_smooth = xr.Variable("reduction", ~np.isin(LABELS["reduction"], ROUGH))
        error = error.where(is_smooth).transpose(*error.dims)
    estimator = f"delete-one jackknife over {len(values)} sequences"
    error.attrs |= {"estimator": estimator, DEGREES: len(values) - 1}
    return error
