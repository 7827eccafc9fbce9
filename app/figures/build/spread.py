"""How sure is a curve, and how wide? Its band, its standard error, and the words that tell which is which."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xarray as xr

from depthscope.app.figures.build.values import pick
from depthscope.app.figures.specification import Array, Selection

__all__ = ["Spread", "spread_of"]

_PERCENTILES = "Band: 1st to 99th percentile over tokens."


class Spread(NamedTuple):
    """What is drawn around a curve, and the sentences that say so."""

    lower: Array | None = None
    upper: Array | None = None
    error: Array | None = None
    words: tuple[str, ...] = ()


def spread_of(
    data: xr.Dataset, curve: xr.DataArray, choice: Selection, around: str, fixed: dict[str, str]
) -> Spread:
    """The band around a curve: quantiles or percentiles over tokens, or ± one error.

    Parameters
    ----------
    data : Dataset
        Analysis of the run.
    curve : DataArray
        One-dimensional slice of a variable, under its name.
    choice : Selection
        What was selected.
    around : str
        Variable that holds the band: along ``quantile``, or as ± of the value; empty where there is none.
    fixed : dict
        Labels that override the selection, those that `pick` does not know among them.

    Returns
    -------
    Spread
    """
    error = _standard_error(data, curve, choice, fixed)
    band = _declared(data, curve, choice, around, fixed) or _percentiles(data, curve, choice, fixed)
    if band is None and error is None:
        return Spread(words=_why_none(data, f"{curve.name}_stderr"))
    words = () if error is None else _error_words(data[f"{curve.name}_stderr"])
    if band is not None:
        said = tuple(f"Whiskers: ± one {word}." for word in words)
        return Spread(band.lower, band.upper, error, (*band.words, *said))
    assert error is not None
    return Spread(curve.values - error, curve.values + error, None, tuple(f"Band: ± one {w}." for w in words))


def _standard_error(
    data: xr.Dataset, curve: xr.DataArray, choice: Selection, fixed: dict[str, str]
) -> Array | None:
    """Standard error along the curve; None where there is none, or none of this reduction."""
    if "reduction" in data[str(curve.name)].dims and choice.reduction != "mean":
        return None
    error = _like(pick(data, f"{curve.name}_stderr", choice, **fixed), curve)
    return None if error is None or not np.isfinite(error).any() else error


def _why_none(data: xr.Dataset, name: str) -> tuple[str, ...]:
    """Why a standard error is nowhere defined, as the analysis says."""
    reason = data[name].attrs.get("undefined_because") if name in data else None
    return (f"No standard error: {reason}.",) if reason else ()


def _error_words(error: xr.DataArray) -> tuple[str, ...]:
    """What the standard error is of, and how it was found where that is not plain."""
    how = str(error.attrs.get("estimator", ""))
    return ("standard error over sequences" + (f" ({how})" if "jackknife" in how else ""),)


def _declared(
    data: xr.Dataset, curve: xr.DataArray, choice: Selection, around: str, fixed: dict[str, str]
) -> Spread | None:
    """The band of the variable that the figure names."""
    found = pick(data, around, choice, **fixed) if around else None
    if found is None or not bool(found.notnull().any()):
        return None
    if "quantile" in found.dims:
        ends = found.transpose("quantile", *curve.dims)
        low, high = (100 * float(q) for q in ends["quantile"].values[[0, -1]])
        return Spread(ends.values[0], ends.values[-1], None, (f"Band: {low:g} to {high:g} % of the tokens.",))
    what = str(data[around].attrs.get("long_name", around)).partition(":")[0]
    words = f"Band: ± {what[0].lower()}{what[1:]}."
    return Spread(curve.values - found.values, curve.values + found.values, None, (words,))


def _percentiles(
    data: xr.Dataset, curve: xr.DataArray, choice: Selection, fixed: dict[str, str]
) -> Spread | None:
    """1st to 99th percentile over tokens, around a mean or a median."""
    whole = data[str(curve.name)]
    known = {str(r) for r in whole["reduction"].values} if "reduction" in whole.dims else set()
    if not {"p1", "p99"} <= known or choice.reduction not in ("mean", "median"):
        return None
    low, high = (
        _like(pick(data, str(curve.name), choice, **fixed | {"reduction": r}), curve) for r in ("p1", "p99")
    )
    return None if low is None or high is None else Spread(low, high, None, (_PERCENTILES,))


def _like(found: xr.DataArray | None, curve: xr.DataArray) -> Array | None:
    """The part of a slice that belongs to the curve, along its axis."""
    if found is None:
        return None
    for dim in [dim for dim in found.dims if dim not in curve.dims]:
        if dim not in curve.coords:
            return None
        found = found.sel({dim: curve.coords[dim].item()})
    return np.asarray(found.transpose(*curve.dims).values, dtype=np.float64)
