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


def fold(value: xr.Variable, scopes: np.ndarray | None = None) -> tuple[xr.Variable, xr.Variable | None]:
    """Take the mean over sequences, with its standard error.

    ``value``: with a dim ``sequence``; or with a dim ``group`` of sequences and of all tokens; or with neither: it is returned
    unchanged.
    ``scopes``: of each group, which of the two it is.
    Returns: Without ``sequence``; ``scope`` in place of ``group``, in the order of the groups.
    Returns: Of the same dims. NaN where fewer than two sequences have a value, and for pooled tokens; None where the
    value has no sequences.
    """
    if "sequence" in value.dims:
        values = value.transpose("sequence", ...)
        mean, error, degrees = mean_and_error(values.values)
        dims = values.dims[1:]
    elif "group" in value.dims:
        assert scopes is not None
        groups = value.transpose("group", ...)
        # Pooled tokens are one group: their mean is the value itself, and their error NaN.
        of_each = [mean_and_error(groups.values[scopes == label]) for label in dict.fromkeys(scopes.tolist())]
        means, errors, every = zip(*of_each, strict=True)
        # That of the pooled tokens is 0.
        mean, error, degrees, dims = (
            np.stack(means),
            np.stack(errors),
            max(every),
            ("scope", *groups.dims[1:]),
        )
    else:
        return value, None
    known = {DEGREES: degrees} if not np.isnan(error).all() else {"undefined_because": ONE_SEQUENCE}
    return xr.Variable(dims, mean, value.attrs), xr.Variable(dims, error, {**value.attrs, **known})


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
