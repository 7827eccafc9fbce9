"""Do two runs differ, and where? Tests over the sequences that both have seen, or over seeds, corrected for many depths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from depthscope.diagnostics.analysis.jackknife import replicas, resampled
from depthscope.diagnostics.metrics.declaration import Metric
from depthscope.diagnostics.metrics.intervals import LEVEL, factor
from depthscope.diagnostics.quantities.over_sequences import mean_and_error
from depthscope.diagnostics.quantities.registry import Quantities, Unavailable

SIGNIFICANCE = 1 - LEVEL
"""A difference is reported where chance alone gives one like it less often than this, over all depths together."""

MOST_EXCHANGES = 20_000
"""Exchanges of the labels of seeds: all of them up to so many, else a draw of so many."""


@dataclass(frozen=True)
class Difference:
    """One metric of one run less that of another, along the depths that both have.

    ``metric``: name in the catalogue.
    ``first, second``: the runs, or groups of runs: `value` is second − first.
    ``value, half_width``: one dimension, ``depth`` or ``connection``; half of the 95 % interval of one number, by
    Student's t. NaN where there is none.
    ``p``: how often chance gives a difference as large at any of the depths: corrected for their number.
    ``how``: what was tested: ``"paired over the same 8 sequences"``.
    ``undecided``: why no difference can be tested however large it is; empty where it can.
    """

    metric: str
    first: str
    second: str
    value: xr.DataArray
    half_width: xr.DataArray
    p: xr.DataArray
    how: str
    undecided: str = ""

    @property
    def differs(self) -> np.ndarray:
        """Positions at which the runs differ, (positions,) of bool."""
        return np.asarray(self.p.values < SIGNIFICANCE) & (not self.undecided)


def by_sequence(trace: xr.Dataset, metric: Metric, *, scope: str = "sequence") -> xr.DataArray | None:
    r"""One number for each sequence of a trace, whose mean is the metric.

    Of a mean over sequences it is the value of each; of a metric over pooled tokens the jackknife's pseudo-value,
    :math:`S \theta - (S - 1) \theta_{(s)}`, with :math:`\theta_{(s)}` measured without sequence :math:`s` (Tukey 1958).

    ``scope``: of a metric that has both: each sequence on its own, or all tokens pooled.
    Returns: With dim ``sequence``; None where the trace cannot feed the metric, or leaving out sequences tells nothing
    about it (extremes and counts).
    """
    if not resampled(metric):
        return None
    try:
        value = metric.unfolded(Quantities(trace, choices={"scope": scope}))
    except Unavailable:
        return None
    if "group" in value.dims and scope == "sequence":
        value = value.isel(group=value["scope"].values == scope).rename(group="sequence")
    if "sequence" in value.dims:
        return value.drop_vars("scope", errors="ignore")
    measured = replicas(trace, [metric]).get(metric.name)
    if measured is None:
        return None
    pooled = value.isel(group=0, drop=True) if "group" in value.dims else value
    without = xr.Variable.concat([each.isel(scope=0, missing_dims="ignore") for each in measured], "sequence")
    number = without.sizes["sequence"]
    return (number * pooled - (number - 1) * without).drop_vars("scope", errors="ignore")


def same_sequences(first: xr.Dataset, second: xr.Dataset, digests: tuple[object, object]) -> bool:
    """Whether two runs have seen the same sequences, so that they can be compared sequence by sequence."""
    if digests[0] is None or digests[0] != digests[1]:
        return False
    masks = [Quantities(trace)["mask"].transpose("sample", "token") for trace in (first, second)]
    if masks[0].shape != masks[1].shape or not np.array_equal(masks[0].values, masks[1].values):
        return False
    # Two runs of one text may have stored other sequences of it.
    has_texts = ["token_text" in trace for trace in (first, second)]
    return not any(has_texts) or (all(has_texts) and first["token_text"].equals(second["token_text"]))


def of_two(metric: str, values: Mapping[str, xr.DataArray], *, paired: bool) -> Difference:
    """The difference of two runs by Student's t over sequences, with the probabilities of many depths corrected by Holm.

    ``values``: run → one number a sequence and position (`by_sequence`), for two runs with the same positions.
    ``paired``: whether they are of the same sequences in the same order: then their differences are tested, which vary
    much less.
    """
    (first, a), (second, b) = values.items()
    axis = next(str(dim) for dim in a.dims if dim != "sequence")
    a, b = (one.transpose("sequence", axis) for one in (a, b))
    mean = b.mean("sequence") - a.mean("sequence").values
    if paired:
        spread = b.values - a.values
        number = (~np.isnan(spread)).sum(axis=0)
        error = mean_and_error(spread)[1]
        degrees = np.maximum(number - 1, 0).astype(float)
        how = f"paired over the same {a.sizes['sequence']} sequences"
    else:
        parts = [mean_and_error(one.values)[1] ** 2 for one in (a, b)]
        own = [np.maximum((~np.isnan(one.values)).sum(axis=0) - 1, 0) for one in (a, b)]
        error = np.sqrt(parts[0] + parts[1])
        degrees = _welch(parts, own)
        how = f"over {a.sizes['sequence']} and {b.sizes['sequence']} sequences that are not the same"
    with np.errstate(divide="ignore", invalid="ignore"):
        p = holm(_two_sided(mean.values / error, degrees))
    few = min(one.sizes["sequence"] for one in (a, b)) < 2
    return Difference(
        metric, first, second, mean, mean.copy(data=_reach(degrees) * error), mean.copy(data=p), how,
        "one sequence: its spread to others is not known; capture more" if few else "",
    )  # fmt: skip


def of_seeds(metric: str, groups: Mapping[str, Sequence[xr.DataArray]]) -> Difference:
    r"""The difference of two groups of runs, such as the seeds of two designs, by exchanging their labels.

    Under the hypothesis that the design makes no difference, every assignment of the runs to the two groups was as likely.
    The largest standardised difference over all positions is compared with that of every other assignment (Westfall & Young
    1993): so it is corrected for the number of positions, however they depend on each other.

    ``groups``: group → one array of positions for each run, for two groups.
    Returns: The interval of one position is Welch's.
    """
    (first, a), (second, b) = groups.items()
    runs = np.stack([one.values for one in (*a, *b)])
    axis = str(a[0].dims[0])
    mean = b[0].copy(data=runs[len(a) :].mean(axis=0) - runs[: len(a)].mean(axis=0))
    scale = runs.std(axis=0)
    # Positions at which all runs agree tell nothing, and would divide by zero.
    scale = np.where(scale > 0, scale, np.inf)
    observed = np.abs(mean.values) / scale
    total = math.comb(len(runs), len(a))
    largest = np.array([_largest(runs, chosen, scale) for chosen in _assignments(len(runs), len(a), total)])
    # The margin is for rounding alone: the assignment that was observed is one of those that are as large.
    p = (largest[:, None] >= observed[None] * (1 - 1e-12)).mean(axis=0)
    parts = [mean_and_error(each)[1] ** 2 for each in (runs[: len(a)], runs[len(a) :])]
    degrees = _welch(parts, [np.full(runs.shape[1], len(one) - 1) for one in (a, b)])
    smallest = (2 if len(a) == len(b) else 1) / total
    return Difference(
        metric, first, second, mean, mean.copy(data=_reach(degrees) * np.sqrt(parts[0] + parts[1])),
        xr.DataArray(p, dims=axis, coords=mean.coords),
        f"over {len(a)} and {len(b)} seeds, by exchanging their labels",
        _too_few(len(a), len(b)) if smallest >= SIGNIFICANCE else "",
    )  # fmt: skip


def holm(p: np.ndarray) -> np.ndarray:
    """Probabilities corrected for their number, such that any false alarm among them is as rare as stated (Holm 1979).

    ``p``: (positions,), NaN where there is no test.

    Examples
    --------
    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    corrected = np.full(p.shape, np.nan)
    stepped = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1.0) if len(order) else []
    return corrected


def _reach(degrees: np.ndarray) -> np.ndarray:
    """By how many standard errors an interval reaches to each side; NaN where there is no degree of freedom."""
    return np.array([factor(each) if each > 0 else math.nan for each in degrees])


def _welch(parts: Sequence[np.ndarray], own: Sequence[np.ndarray]) -> np.ndarray:
    """Degrees of freedom of the difference of two means with variances of their own (Satterthwaite 1946)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        below = sum(part**2 / degrees for part, degrees in zip(parts, own, strict=True))
        degrees = (parts[0] + parts[1]) ** 2 / below
    return np.where(np.isfinite(degrees), degrees, 0.0)


def _two_sided(t: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    from scipy.special import stdtr

    # Two runs that are equal to the last bit have a difference of 0 with an error of 0: no difference, not an unknown one.
    known = np.where(np.isnan(t) & (degrees > 0), 0.0, t)
    return np.where(degrees > 0, 2 * stdtr(np.maximum(degrees, 1), -np.abs(known)), np.nan)


def _assignments(total: int, chosen: int, number: int) -> Iterable[tuple[int, ...]]:
    """Which runs are called the first group: every choice, or a draw of many of them with the observed one."""
    if number <= MOST_EXCHANGES:
        return itertools.combinations(range(total), chosen)
    generator = np.random.default_rng(0)
    drawn = (tuple(generator.permutation(total)[:chosen]) for _ in range(MOST_EXCHANGES - 1))
    return itertools.chain([tuple(range(chosen))], drawn)


def _largest(runs: np.ndarray, chosen: tuple[int, ...], scale: np.ndarray) -> float:
    first = np.zeros(len(runs), dtype=bool)
    first[list(chosen)] = True
    return float(np.nanmax(np.abs(runs[~first].mean(axis=0) - runs[first].mean(axis=0)) / scale))


def _too_few(first: int, second: int) -> str:
    enough = next(n for n in itertools.count(2) if 2 / math.comb(2 * n, n) < SIGNIFICANCE)
    return f"{first} and {second} seeds can be assigned in too few ways to detect a difference; train {enough} of each"
