"""How sure is a mean over sequences? Student's interval, which is right for the few sequences that are mostly run."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from depthscope.diagnostics.metrics.intervals import factor


class Estimate(NamedTuple):
    """A mean over sequences with its standard error and 95 % interval; NaN where one sequence is too few to tell."""

    mean: float
    error: float
    low: float
    high: float
    sequences: int


def estimate(values: np.ndarray) -> Estimate:
    """Mean of independent sequences, x̄ ± t₀.₉₇₅(S − 1) · s/√S.

    With S sequences the t distribution has S − 1 degrees of freedom: at S = 4 the interval is 3.18 standard errors to each
    side, where the normal law's 1.96 would cover too little.

    Parameters
    ----------
    values : ndarray
        One number a sequence, any unit; sequences without a number (NaN) do not count.

    Returns
    -------
    Estimate
        In the unit of the values.

    References
    ----------
    Student, "The probable error of a mean", Biometrika 6 (1908).

    Examples
    --------
    >>> found = estimate(np.array([1.0, 2.0, 3.0]))
    >>> found.mean, round(found.error, 4), round(found.low, 3)
    (2.0, 0.5774, -0.484)
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    count = known.size
    if not count:
        return Estimate(np.nan, np.nan, np.nan, np.nan, 0)
    mean = float(known.mean())
    if count < 2:
        return Estimate(mean, np.nan, np.nan, np.nan, count)
    error = float(known.std(ddof=1) / np.sqrt(count))
    reach = factor(count - 1) * error
    return Estimate(mean, error, mean - reach, mean + reach, count)
