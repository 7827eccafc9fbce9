"""How sure is a mean over sequences? Student's interval, which is right for the few sequences that are mostly run."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from depthscope.diagnostics.experiments.variables import ESTIMATES
from depthscope.diagnostics.metrics.intervals import factor
from depthscope.diagnostics.quantities.over_sequences import mean_and_error


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

    ``values``: one number a sequence, any unit; sequences without a number (NaN) do not count.

    References
    ----------
    Student, "The probable error of a mean", Biometrika 6 (1908).

    Examples
    --------
    >>> found = estimate(np.array([1.0, 2.0, 3.0]))
    >>> found.mean, round(found.error, 4), round(found.low, 3)
    (2.0, 0.5774, -0.484)
    """
    values = np.asarray(values, dtype=np.float64)
    mean, error, degrees = mean_and_error(values)
    reach = factor(degrees) * error if degrees else np.nan
    count = int((~np.isnan(values)).sum())
    return Estimate(float(mean), float(error), float(mean - reach), float(mean + reach), count)


def estimated(
    name: str, dims: tuple[str, ...], values: np.ndarray
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Each sequence's mean over its tokens, and of these the mean over sequences, with its error and interval.

    ``dims``: dims of the values before sequences and tokens.
    ``values``: naN where a token does not count.
    Returns: Four variables of a Dataset, see `ESTIMATES`.
    """
    counts = (~np.isnan(values)).sum(-1)
    of_sequence = np.divide(
        np.nansum(values, -1), counts, out=np.full(counts.shape, np.nan), where=counts > 0
    )
    found = np.array([estimate(row)[:4] for row in of_sequence.reshape(-1, of_sequence.shape[-1])])
    columns = found.reshape(*of_sequence.shape[:-1], 4)
    return {f"{name}{ending}": (dims, columns[..., at]) for at, ending in enumerate(ESTIMATES)}
