"""What do the sequences say together? The mean of a number over them, and its standard error.

Tokens of one sequence depend on each other; sequences are drawn apart. So the spread between sequences, and not
that between tokens, says how far a number would move with other data.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

ALONE = "one sequence: how far another would lie is not known"


def fold(value: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray | None]:
    """Take the mean over sequences, with its standard error.

    Parameters
    ----------
    value : DataArray
        With a dim ``sequence``; or with a dim ``group`` whose coordinate ``scope`` says which groups are sequences
        and which hold all tokens; or with neither: it is given back as it is.

    Returns
    -------
    value : DataArray
        Without ``sequence``; ``scope`` in place of ``group``.
    error : DataArray or None
        Of the same dims. NaN where fewer than two sequences have a value, and for pooled tokens; None where the
        value knows no sequences.
    """
    if "sequence" in value.dims:
        template = value.isel(sequence=0, drop=True)
        mean, error = _mean_and_error(value.transpose("sequence", ...).values)
        return template.copy(data=mean), _with_reason(template.copy(data=error))
    if "group" not in value.dims:
        return value, None
    template = value.isel(group=0, drop=True)
    scopes, values = value["scope"].values, value.transpose("group", ...).values
    labels = list(dict.fromkeys(scopes.tolist()))
    parts = [_mean_and_error(values[scopes == label]) for label in labels]
    means, errors = (
        template.expand_dims(scope=labels).copy(data=np.stack(of)) for of in zip(*parts, strict=True)
    )
    return means, _with_reason(errors)


def _mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis of what is not NaN, and its standard error; NaN where too little is left."""
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    mean = np.where(known, values, 0.0).sum(axis=0) / np.where(count > 0, count, np.nan)
    apart = np.where(known, values - mean, 0.0)
    spread = (apart**2).sum(axis=0) / np.where(count > 1, count - 1, np.nan)
    return mean, np.sqrt(spread / np.where(count > 1, count, np.nan))


def _with_reason(error: xr.DataArray) -> xr.DataArray:
    return error.assign_attrs(undefined_because=ALONE) if error.isnull().all() else error
