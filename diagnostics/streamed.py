"""What does every token say, not a sample of them? Ranks and CKA from sums that were streamed in one pass.

Of the mean over streams, all real tokens, since the weights last changed. Which tokens are massive is known only
when all were seen, so that they cannot be left out here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from diagnostics.kernels import rank
from diagnostics.kernels.similarity import cka_from_hsic
from diagnostics.metric import Null, metric
from diagnostics.quantities import quantity
from diagnostics.states import noise_ranks

# A rank that the rounding of the sums may move by more than this share is undefined.
RESOLVED = 1e-3
OF_SUMS = f"plug-in over every token; NaN where float32 sums leave more than {RESOLVED:g} of it open"


@quantity
def streamed_spectra(
    eigenvalue: xr.DataArray, eigenvalue_shaken: xr.DataArray, centering: tuple[str, ...]
) -> tuple[xr.DataArray, xr.DataArray]:
    """Singular values of all tokens, and the same as far as rounding may have moved them."""
    plain, shaken = (found.sel(centering=list(centering)) ** 0.5 for found in (eigenvalue, eigenvalue_shaken))
    return plain, shaken


def _resolved(measure: Callable[[Any], Any], spectra: tuple[xr.DataArray, xr.DataArray]) -> xr.DataArray:
    """A rank of every spectrum; NaN, and named in the attributes, where the rounding of the sums decides it."""
    plain, shaken = (
        xr.apply_ufunc(measure, values.fillna(0.0), input_core_dims=[["component"]]) for values in spectra
    )
    known = abs(shaken - plain) <= RESOLVED * plain
    lost = (~known & plain.notnull()).transpose("centering", "depth")
    if not lost.any():
        return plain
    names = [
        f"{centering} at depth {', '.join(map(str, part['depth'].values[part.values]))}"
        for centering, part in zip(lost["centering"].values, lost, strict=True)
        if part.any()
    ]
    why = f"float32 sums do not resolve the small directions ({'; '.join(names)}): read the metric of the sampled tokens"
    return plain.where(known).assign_attrs(undefined_because=why)


def _of_noise(name: str) -> Null:
    """The same rank of iid noise at the same number of tokens and features."""

    def expectation(streamed_count: xr.DataArray, eigenvalue: xr.DataArray) -> xr.DataArray:
        width = eigenvalue.sizes["component"]
        count = streamed_count.where(streamed_count > 0)
        return xr.apply_ufunc(np.vectorize(lambda n: noise_ranks(n, width)[name], otypes=[float]), count)

    return expectation


@metric(
    symbol=r"\mathrm{erank}(\Sigma)",
    cite="roy2007effective",
    basis="invariant",
    null=_of_noise("effective_rank"),
    estimator=OF_SUMS,
)
def streamed_effective_rank(streamed_spectra: tuple[xr.DataArray, xr.DataArray]) -> xr.DataArray:
    r"""Effective rank of every token seen: how many directions carry the size of the signal.

    .. math:: \exp H(\sqrt{\lambda} / \textstyle\sum\sqrt{\lambda}), \quad \lambda = \mathrm{eig} \sum_i x_i x_i^\top

    Raw, or about the mean. Where a few directions hold nearly all, squares in float32 do not tell how many
    there are below: then it is NaN.
    """
    return _resolved(rank.effective_rank_of, streamed_spectra)


@metric(
    symbol=r"\exp S_1(\Sigma)",
    cite="skean2025layer",
    basis="invariant",
    null=_of_noise("entropy_rank"),
    estimator=OF_SUMS,
)
def streamed_entropy_rank(streamed_spectra: tuple[xr.DataArray, xr.DataArray]) -> xr.DataArray:
    r"""Matrix-entropy rank of every token seen: how many directions carry the energy of the signal.

    .. math:: \exp H(\lambda / \textstyle\sum\lambda)
    """
    return _resolved(rank.entropy_rank_of, streamed_spectra)


@metric(
    symbol=r"\mathrm{PR}(\Sigma)",
    cite="chun2026estimating",
    basis="invariant",
    null=_of_noise("participation_ratio"),
    estimator=OF_SUMS,
)
def streamed_participation_ratio(streamed_spectra: tuple[xr.DataArray, xr.DataArray]) -> xr.DataArray:
    r"""Participation ratio of every token seen: how many directions share the variance.

    .. math:: (\textstyle\sum\lambda)^2 / \sum\lambda^2
    """
    return _resolved(rank.participation_ratio_of, streamed_spectra)


@metric(
    symbol=r"\mathrm{srank}(\Sigma)",
    cite="rudelson2007sampling",
    basis="invariant",
    null=_of_noise("stable_rank"),
    estimator=OF_SUMS,
)
def streamed_stable_rank(streamed_spectra: tuple[xr.DataArray, xr.DataArray]) -> xr.DataArray:
    r"""Stable rank of every token seen: the energy in units of the strongest direction.

    .. math:: \textstyle\sum\lambda / \max\lambda
    """
    return _resolved(rank.stable_rank_of, streamed_spectra)


def _cka(hsic: xr.DataArray) -> xr.DataArray:
    table = hsic.transpose(..., "depth", "other_depth")
    own = np.diagonal(table.values, axis1=-2, axis2=-1)
    return table.copy(data=cka_from_hsic(table.values, own[..., :, None], own[..., None, :]))


@metric(
    symbol=r"\widehat{\mathrm{CKA}}",
    cite="song2012feature",
    basis="invariant",
    null=0.0,
    estimator="unbiased HSIC1 from a signed row sketch and the heaviest tokens; its error is streamed_cka_error",
)
def streamed_cka(hsic: xr.DataArray) -> xr.DataArray:
    r"""Linear CKA between depths over every token seen: 1 for the same geometry of tokens.

    .. math:: \mathrm{HSIC}_1(X, Y) / \sqrt{\mathrm{HSIC}_1(X, X)\,\mathrm{HSIC}_1(Y, Y)}

    Tokens go, with random signs, into buckets that all depths share; the heaviest are kept as they are, and up to
    their number the value is exact. It may be negative, or exceed 1 by its error.
    """
    return _cka(hsic)


@metric(
    symbol=r"\mathrm{se}(\widehat{\mathrm{CKA}})",
    cite="song2012feature",
    basis="invariant",
    null="none: it is an error",
    estimator="jackknife over groups of buckets",
)
def streamed_cka_error(hsic_without: xr.DataArray) -> xr.DataArray:
    r"""Standard error of the streamed CKA, by leaving out one group of buckets at a time.

    .. math:: \sqrt{\tfrac{G - 1}{G} \textstyle\sum_g (c_g - \bar{c})^2}
    """
    tables = _cka(hsic_without)
    groups = tables.sizes["group"]
    return (((tables - tables.mean("group")) ** 2).sum("group", skipna=False) * (groups - 1) / groups) ** 0.5
