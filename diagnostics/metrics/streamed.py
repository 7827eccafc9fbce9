"""What are ranks and CKA over every token, not a sample? From sums that were streamed in one pass.

Ranks of the mean over streams and of each stream, all real tokens, since the weights last changed. Which tokens are
massive is known only after the last one, so that they cannot be left out here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import geometry, rank
from depthscope.diagnostics.kernels.similarity import cka_from_hsic
from depthscope.diagnostics.metrics.declaration import OURS, Null, metric
from depthscope.diagnostics.metrics.shape import FIRST, LAST, TOP
from depthscope.diagnostics.quantities.registry import quantity
from depthscope.diagnostics.quantities.token_spectra import noise_ranks, over_spectra
from depthscope.diagnostics.quantities.tokens import for_each_count

# Squares in float32 lose the directions with less than about 3e-4 of the largest singular value. The capture stores the
# spectrum a second time, of sums moved by as much as rounding may have: a rank that this changes by more than a share of
# RESOLVED is undefined. Heuristic.
RESOLVED = 1e-3
# What the rounding of the products adds to the relative error of any rank; the spacing of float32 is 1.2e-7.
OF_FLOAT32 = 2e-7
OF_SUMS = f"plug-in over every token; undefined where float32 sums leave more than {RESOLVED:g} of it open"


@quantity
def streamed_spectra(
    eigenvalue: xr.DataArray,
    eigenvalue_shaken: xr.DataArray,
    stream_eigenvalue: xr.DataArray,
    stream_eigenvalue_shaken: xr.DataArray,
    centering: tuple[str, ...],
) -> tuple[xr.DataArray, xr.DataArray]:
    """Singular values of all tokens, and the same as far as rounding may have moved them."""
    # Eigenvalues of Σ x xᵀ are squares of the singular values that the kernels take.
    spectrum = _of_views(eigenvalue, stream_eigenvalue).sel(centering=list(centering)) ** 0.5
    moved = _of_views(eigenvalue_shaken, stream_eigenvalue_shaken).sel(centering=list(centering)) ** 0.5
    return spectrum.assign_attrs(_of_part(eigenvalue)), moved


def _of_part(of: xr.DataArray) -> dict[str, str]:
    """An attribute where not every sequence was streamed."""
    every = of.attrs.get("every", 1)
    return {"sequences": f"one in {every}; streamed_count is of their tokens"} if every > 1 else {}


def _of_views(mean: xr.DataArray, streams: xr.DataArray) -> xr.DataArray:
    """Spectra of the mean over streams, and of each of several, by their labels."""
    # A training curve has a label "mean" in all its variables: NaN here, for that spectrum is `eigenvalue`.
    labels = [str(label) for label in streams["stream"].values]
    streams = streams.assign_coords(stream=labels).sel(stream=[label for label in labels if label != "mean"])
    # A single stream is its own mean.
    views = [mean.expand_dims(stream=["mean"]), *([streams] if streams.sizes["stream"] > 1 else [])]
    return xr.concat(views, "stream").transpose(..., "depth", "stream", "component")


def _resolved(measure: Callable[[Any], Any], spectra: tuple[xr.DataArray, xr.DataArray]) -> xr.DataArray:
    """A number of every spectrum with its stated error; NaN, and named, where the rounding of the sums decides it."""
    value, moved = (over_spectra(measure, spectrum) for spectrum in spectra)
    change = abs(moved - value) / abs(value)
    # NaN compares as false: what is undefined in either spectrum is not resolved.
    resolved = change <= RESOLVED
    found = value.where(resolved).assign_attrs(spectra[0].attrs)
    if bool(resolved.any()):
        # Twice the largest change: rounding may have moved the sums either way.
        found = found.assign_attrs(relative_error=2.0 * float(change.where(resolved).max()) + OF_FLOAT32)
    # What is NaN for another reason, as a depth of zeros, is not blamed on rounding.
    lost = ~resolved & value.notnull()
    return found.assign_attrs(undefined_because=_reason(lost)) if bool(lost.any()) else found


def _reason(lost: xr.DataArray) -> str:
    """What float32 sums do not resolve, by centering, and by stream where there are several."""
    flat = lost.stack(case=[dim for dim in lost.dims if dim != "depth"]).transpose("case", "depth")
    cases = []
    for case in flat:
        if not bool(case.any()):
            continue
        name = str(case["centering"].item())
        if "stream" in lost.dims and lost.sizes["stream"] > 1:
            name += f", stream {case['stream'].item()}"
        cases.append(f"{name} at depth {', '.join(map(str, case['depth'].values[case.values]))}")
    return (
        f"float32 sums do not resolve the small directions ({'; '.join(cases)}): "
        "read the metric of the sampled tokens"
    )


def _of_noise(name: str) -> Null:
    """The same rank of iid noise at the same number of tokens and features."""

    def expectation(streamed_count: xr.DataArray, eigenvalue: xr.DataArray) -> xr.DataArray:
        width = eigenvalue.sizes["component"]
        count = streamed_count.where(streamed_count > 0)
        return for_each_count(count, lambda n: noise_ranks(n, width)[name])

    return expectation


@metric(
    symbol=r"\mathrm{erank}(\Sigma)",
    dims="centering depth stream",
    cite="roy2007effective",
    basis="invariant",
    null=_of_noise("effective_rank"),
    estimator=OF_SUMS,
    headline=True,
    better="higher",
)
def streamed_effective_rank(streamed_spectra: tuple[xr.DataArray, xr.DataArray]) -> xr.DataArray:
    r"""Effective rank of every token seen: how many directions carry the size of the signal.

    .. math:: \exp H(\sqrt{\lambda} / \textstyle\sum\sqrt{\lambda}), \quad \lambda = \mathrm{eig} \sum_i x_i x_i^\top

    Raw, or about the mean. Where a few directions carry nearly all, squares in float32 do not tell how many
    there are below: then it is NaN.
    """
    return _resolved(rank.effective_rank_of, streamed_spectra)


@metric(
    symbol=r"\exp S_1(\Sigma)",
    dims="centering depth stream",
    cite="skean2025layer",
    basis="invariant",
    null=_of_noise("entropy_rank"),
    estimator=OF_SUMS,
    better="higher",
)
def streamed_entropy_rank(streamed_spectra: tuple[xr.DataArray, xr.DataArray]) -> xr.DataArray:
    r"""Matrix-entropy rank of every token seen: how many directions carry the energy of the signal.

    .. math:: \exp H(\lambda / \textstyle\sum\lambda)
    """
    return _resolved(rank.entropy_rank_of, streamed_spectra)


@metric(
    symbol=r"\mathrm{PR}(\Sigma)",
    dims="centering depth stream",
    cite="chun2026estimating",
    basis="invariant",
    null=_of_noise("participation_ratio"),
    estimator=OF_SUMS,
    better="higher",
)
def streamed_participation_ratio(streamed_spectra: tuple[xr.DataArray, xr.DataArray]) -> xr.DataArray:
    r"""Participation ratio of every token seen: how many directions share the variance.

    .. math:: (\textstyle\sum\lambda)^2 / \sum\lambda^2
    """
    return _resolved(rank.participation_ratio_of, streamed_spectra)


@metric(
    symbol=r"\mathrm{srank}(\Sigma)",
    dims="centering depth stream",
    cite="rudelson2007sampling",
    basis="invariant",
    null=_of_noise("stable_rank"),
    estimator=OF_SUMS,
    better="higher",
)
def streamed_stable_rank(streamed_spectra: tuple[xr.DataArray, xr.DataArray]) -> xr.DataArray:
    r"""Stable rank of every token seen: the energy in units of the strongest direction.

    .. math:: \textstyle\sum\lambda / \max\lambda
    """
    return _resolved(rank.stable_rank_of, streamed_spectra)


def _of_spectrum(measure: Callable[[Any], Any]) -> Null:
    """A number of the expected spectrum of iid noise at the same number of tokens and features."""

    def expectation(streamed_count: xr.DataArray, eigenvalue: xr.DataArray) -> xr.DataArray:
        width = eigenvalue.sizes["component"]
        known = streamed_count.where(streamed_count > 0)
        # One integral for each number of tokens, which most depths have in common.
        values = {
            count: float(measure(rank.marchenko_pastur(int(count), width).singular_values()))
            for count in np.unique(known.values[known.notnull().values]).tolist()
        }
        # A depth without tokens has NaN, which is no key.
        return for_each_count(known, lambda n: values.get(n, float("nan")))

    return expectation


def _top_energy(s: Any) -> Any:
    return rank.top_energy_of(s, TOP)


def _alpha(s: Any) -> Any:
    return geometry.alpha_req_of(s, first=FIRST, last=LAST).alpha


@metric(
    symbol=r"\textstyle\sum_{i \le 10} \lambda_i / \sum_i \lambda_i",
    dims="centering depth stream",
    cite=OURS,
    basis="invariant",
    null=_of_spectrum(_top_energy),
    estimator=OF_SUMS,
)
def streamed_top_energy(streamed_spectra: tuple[xr.DataArray, xr.DataArray]) -> xr.DataArray:
    r"""Share of the energy of every token seen in the ten strongest directions.

    .. math:: \textstyle\sum_{i \le 10} \lambda_i / \sum_i \lambda_i
    """
    return _resolved(_top_energy, streamed_spectra)


@metric(
    symbol=r"\alpha(\Sigma)",
    dims="centering depth stream",
    label="streamed α-ReQ",
    cite="agrawal2022alpha",
    basis="invariant",
    null=_of_spectrum(_alpha),
    estimator=f"least squares in log-log with weights 1/rank over the eigenvalues {FIRST} to {LAST}; {OF_SUMS}",
)
def streamed_alpha_req(streamed_spectra: tuple[xr.DataArray, xr.DataArray]) -> xr.DataArray:
    r"""Power-law exponent of the spectrum of every token seen: how fast the variance falls.

    .. math:: \lambda_i \propto i^{-\alpha}

    Near 1 in good representations; larger: few directions hold the variance, smaller: it spreads as noise does.
    """
    return _resolved(_alpha, streamed_spectra)


def _cka(hsic: xr.DataArray) -> xr.DataArray:
    # Attributes of the sums are dropped below: they describe HSIC; only which part was streamed is true of CKA too.
    table = hsic.transpose(..., "depth", "other_depth")
    own = np.diagonal(table.values, axis1=-2, axis2=-1)
    found = table.copy(data=cka_from_hsic(table.values, own[..., :, None], own[..., None, :]))
    return found.drop_attrs().assign_attrs(_of_part(hsic))


@metric(
    symbol=r"\widehat{\mathrm{CKA}}",
    dims="depth other_depth",
    label="streamed CKA",
    cite="song2012feature",
    basis="invariant",
    null=0.0,  # HSIC1 is unbiased, so that few tokens raise nothing
    estimator="unbiased HSIC₁ from a signed row sketch and the heaviest tokens",
)
def streamed_cka(hsic: xr.DataArray) -> xr.DataArray:
    r"""Linear CKA between depths over every token seen: 1 for the same geometry of tokens.

    .. math:: \mathrm{HSIC}_1(X, Y) / \sqrt{\mathrm{HSIC}_1(X, X)\,\mathrm{HSIC}_1(Y, Y)}

    Tokens go, with random signs, into buckets that all depths share; the heaviest are stored one by one, and up to
    their number the value is exact. It may be negative, or exceed 1 by its error.
    """
    return _cka(hsic)


@metric(
    symbol=r"\mathrm{se}(\widehat{\mathrm{CKA}})",
    dims="depth other_depth",
    label="streamed CKA error",
    cite="song2012feature",
    basis="invariant",
    null="none: it is an error",
    estimator="jackknife over groups of buckets",
    smooth=False,
)
def streamed_cka_error(hsic_without: xr.DataArray) -> xr.DataArray:
    r"""Standard error of the streamed CKA, by leaving out one group of buckets at a time.

    .. math:: \sqrt{\tfrac{G - 1}{G} \textstyle\sum_g (c_g - \bar{c})^2}
    """
    # skipna=False below: the other groups alone would be no fair sample, as in `analysis.jackknife`.
    tables = _cka(hsic_without)
    groups = tables.sizes["group"]
    return (((tables - tables.mean("group")) ** 2).sum("group", skipna=False) * (groups - 1) / groups) ** 0.5
