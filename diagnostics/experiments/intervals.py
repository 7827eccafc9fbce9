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
    """Mean of independent sequences, x̄ ± t₀.₉₇₅(S − 1) · s/√S, of which those without a number (NaN) do not count.

    At S = 4 the interval is 3.18 standard errors to each side, where the normal law's 1.96 would cover too little.
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

    ``dims``: of the values before sequences and tokens, which are NaN where a token does not count.
    Returns: Four variables of a Dataset, see `ESTIMATES`.
    """
    counts = (~np.isnan(values)).sum(-1)
    of_sequence = np.divide(
        np.nansum(values, -1), counts, out=np.full(counts.shape, np.nan), where=counts > 0
    )
    found = np.array([estimate(row)[:4] for row in of_sequence.reshape(-1, of_sequence.shape[-1])])
    columns = found.reshape(*of_sequence.shape[:-1], 4)
    return {f"{name}{ending}": (dims, columns[..., at]) for at, ending in enumerate(ESTIMATES)}


# Of two measures, relative to the larger one: what differs by less may be rounding. A heuristic
UNCLEAR = 1e-4


def share_of(part: np.ndarray, whole: np.ndarray, scale: np.ndarray) -> tuple[dict[str, np.ndarray], str]:
    r"""Share of a difference: Σ partₛ / Σ wholeₛ over sequences s, with its interval, where the denominator is clear.

    The error is that of a ratio of means, :math:`\mathrm{sd}(part_s - r\, whole_s) / (\sqrt{S}\, |\overline{whole}|)`
    (Cochran, "Sampling Techniques", 1977, chapter 6).

    ``part``: (…, S); NaN where a sequence does not count. ``whole``: (S,).
    ``scale``: (S,), sizes of what ``whole`` is a difference of.
    Returns: By an ending of `ESTIMATES`, and why all of them are NaN; empty where they are not.

    Examples
    --------
    >>> shares, why = share_of(np.array([[2.0, 2.5, 3.0]]), np.array([4.0, 5.0, 6.0]), np.ones(3))
    >>> shares[""], why
    (array([0.5]), '')
    """
    shape = part.shape[:-1]
    found = {ending: np.full(shape, np.nan) for ending in ESTIMATES}
    why = _unclear(whole, scale)
    if why:
        return found, why
    for at in np.ndindex(shape):
        counted = ~np.isnan(part[at]) & ~np.isnan(whole)
        # Of the sequences that count in this cell, whose difference may be none though that of all is clear.
        if not counted.any() or _unclear(whole[counted], scale[counted]):
            continue
        mean = whole[counted].mean()
        share = part[at][counted].mean() / mean
        of_rest = estimate(part[at][counted] - share * whole[counted])
        error, reach = of_rest.error / abs(mean), (of_rest.high - of_rest.mean) / abs(mean)
        for ending, value in zip(ESTIMATES, (share, error, share - reach, share + reach), strict=True):
            found[ending][at] = value
    return found, ""


def _unclear(whole: np.ndarray, scale: np.ndarray) -> str:
    """Why a difference is no denominator; empty where it is one."""
    found = estimate(whole)
    if not found.sequences:
        return "the difference between the two inputs is known of no sequence"
    interval = f"{found.mean:.3g} (95 %: {found.low:.3g} to {found.high:.3g})"
    if not abs(found.mean) > UNCLEAR * float(np.nanmean(scale)):
        return f"the two inputs differ by {interval}, which may be rounding"
    if found.low <= 0 <= found.high:
        return f"the two inputs differ by {interval}, so that no difference is possible; more sequences would tell"
    return ""
