"""What is a number over all sequences? Its mean over them, and its standard error.

Tokens of one sequence depend on each other; sequences are drawn independently. So the spread between sequences, and not
that between tokens, estimates how far a number would move with other data.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

DEGREES = "degrees_of_freedom"
"""Attribute of a standard error: the number of sequences that it comes from, less one."""

ONE_SEQUENCE = "one sequence: its spread to others is not known"


def fold(value: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray | None]:
    """Take the mean over sequences, with its standard error.

    ``value``: with a dim ``sequence``; or with a dim ``group`` whose coordinate ``scope`` tells which groups are
    sequences and which contain all tokens; or with neither: it is returned unchanged.
    Returns: Without ``sequence``; ``scope`` in place of ``group``.
    Returns: Of the same dims. NaN where fewer than two sequences have a value, and for pooled tokens; None where the
    value has no sequences.
    """
    if "sequence" in value.dims:
        template = value.isel(sequence=0, drop=True)
        mean, error, degrees = mean_and_error(value.transpose("sequence", ...).values)
        return template.copy(deep=False, data=mean), _with_degrees(
            template.copy(deep=False, data=error), degrees
        )
    if "group" not in value.dims:
        return value, None
    template = value.isel(group=0, drop=True)
    scopes, values = value["scope"].values, value.transpose("group", ...).values
    # Pooled tokens are one group: their mean is the value itself, and their error NaN.
    means, errors, degrees = {}, {}, 0
    for label in dict.fromkeys(scopes.tolist()):
        means[label], errors[label], of_label = mean_and_error(values[scopes == label])
        degrees = max(degrees, of_label)  # the other one is that of the pooled tokens, 0
    by_scope = template.expand_dims(scope=list(means))
    value = by_scope.copy(deep=False, data=np.stack(list(means.values())))
    return value, _with_degrees(by_scope.copy(deep=False, data=np.stack(list(errors.values()))), degrees)


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean over sequences of what is not NaN, its standard error, and the degrees of freedom of that.

    Returns: NaN where too few sequences have a value: of none no mean, of one no error.
    """
    # Not nanmean and nanstd: they warn where all are NaN, which is a value here.
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    mean = np.where(known, values, 0.0).sum(axis=0) / np.where(count > 0, count, np.nan)
    deviation = np.where(known, values - mean, 0.0)
    # Over count − 1: the mean is estimated from the same sequences.
    variance = (deviation**2).sum(axis=0) / np.where(count > 1, count - 1, np.nan)
    # Of numbers that not every sequence has, the fewest sequences count: an interval is rather too wide than too narrow.
    degrees = int(count[count > 1].min()) - 1 if (count > 1).any() else 0
    return mean, np.sqrt(variance / np.where(count > 1, count, np.nan)), degrees


def _with_degrees(error: xr.DataArray, degrees: int) -> xr.DataArray:
    """A standard error with its degrees of freedom, or with the reason why there is none."""
    if error.isnull().all():
        return error.assign_attrs(undefined_because=ONE_SEQUENCE)
    return error.assign_attrs({DEGREES: degrees})
