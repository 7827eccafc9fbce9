"""What are metrics over every token, not a sample? The same formulas, on what was streamed in one pass.

Of the mean over streams and of each stream, all real tokens, since the weights last changed. Which tokens are massive is
known only after the last one, so that they cannot be left out here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels.similarity import cka_from_hsic
from depthscope.diagnostics.metrics.collapse import SPECTRAL
from depthscope.diagnostics.metrics.declaration import Function, Metric, Null, metric
from depthscope.diagnostics.quantities.registry import Quantities, quantity, roots

# Squares in float32 lose the directions with less than about 3e-4 of the largest singular value. The capture stores the
# spectrum a second time, of sums moved by as much as rounding may have: a rank that this changes by more than a share of
# RESOLVED is undefined. Heuristic.
RESOLVED = 1e-3
# What the rounding of the products adds to the relative error of any rank; the spacing of float32 is 1.2e-7.
OF_FLOAT32 = 2e-7
OF_SUMS = f"plug-in over every token; undefined where float32 sums leave more than {RESOLVED:g} of it open"
OF_SKETCH = "unbiased HSIC₁ from a signed row sketch and the heaviest tokens"
NOT_RESOLVED = (
    "Of every token since the weights last changed. Where a few directions carry nearly all, squares in float32\n"
    "do not tell how many there are below: then it is NaN."
)
SKETCHED = (
    "Of every token since the weights last changed: they go, with random signs, into buckets that all depths share;\n"
    "the heaviest are stored one by one, and up to their number the value is exact. It may be negative, or exceed 1\n"
    "by its error."
)

SYMBOLS = {
    "cka": r"\widehat{\mathrm{CKA}}",
}
"""As runs have stored them; of every other metric it is its own, of Σ."""


@quantity
def streamed_spectra(
    eigenvalue: xr.DataArray,
    eigenvalue_shaken: xr.DataArray,
    stream_eigenvalue: xr.DataArray,
    stream_eigenvalue_shaken: xr.DataArray,
    centering: tuple[str, ...],
) -> tuple[Quantities, Quantities]:
    """Singular values of all tokens as quantities, and the same as far as rounding may have moved them."""
    sources = Quantities(xr.Dataset()), Quantities(xr.Dataset())
    parts = (eigenvalue, stream_eigenvalue), (eigenvalue_shaken, stream_eigenvalue_shaken)
    for source, (mean, streams) in zip(sources, parts, strict=True):
        # Eigenvalues of Σ x xᵀ are squares of the singular values that the kernels take.
        spectra = _of_views(mean, streams).sel(centering=list(centering)) ** 0.5
        spectra = spectra.drop_vars("component", errors="ignore")
        source.give("singular_values", spectra.assign_attrs(_of_part(eigenvalue)))
    return sources


@quantity
def streamed_similarity(hsic: xr.DataArray) -> Quantities:
    """CKA between depths over all tokens as a quantity."""
    source = Quantities(xr.Dataset(), choices={"estimator": "unbiased", "tokens": "all"})
    source.give("cka_table", _cka(hsic).expand_dims(("estimator", "tokens")))
    return source


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


def _resolved(value: xr.DataArray, moved: xr.DataArray) -> xr.DataArray:
    """A number of every spectrum with its stated error; NaN, and named, where the rounding of the sums decides it."""
    change = abs(moved - value) / abs(value)
    # NaN compares as false: what is undefined in either spectrum is not resolved.
    resolved = change <= RESOLVED
    found = value.where(resolved).assign_attrs(value.attrs)
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


def _cka(hsic: xr.DataArray) -> xr.DataArray:
    # Attributes of the sums are dropped below: they describe HSIC; only which part was streamed is true of CKA too.
    table = hsic.transpose(..., "depth", "other_depth")
    own = np.diagonal(table.values, axis1=-2, axis2=-1)
    found = table.copy(data=cka_from_hsic(table.values, own[..., :, None], own[..., None, :]))
    return found.drop_attrs().assign_attrs(_of_part(hsic))


def variants(declared: Iterable[Metric]) -> Iterator[Metric]:
    """The metrics of every token, ``streamed_NAME``, of those whose quantities streamed sums supply."""
    for each in declared:
        if not each.smooth:  # such as the error of a fit, which is drawn with what was fitted
            continue
        if roots(each.function, {"singular_values": lambda: None}) == ():
            yield _variant(
                each,
                _of_spectra(each),
                NOT_RESOLVED,
                null=_null_of_every_token(each),
                estimator=each.estimator.replace(SPECTRAL, OF_SUMS),
            )
        elif roots(each.function, {"cka_table": lambda: None}) == ():
            yield _variant(
                each,
                _of_similarity(each),
                SKETCHED,
                null=0.0,
                estimator=OF_SKETCH,
                cite="song2012feature",
                headline=False,
            )


def _variant(of: Metric, function: Function, note: str, **stated: Any) -> Metric:
    """A metric of every token, with the declaration of the one that it is a variant of."""
    name = f"streamed_{of.name}"
    function.__name__ = name
    title, rest = of.title, of.description[len(of.title) :]
    description = f"{title} of every token seen{rest}"
    declared = replace(
        of,
        name=name,
        symbol=SYMBOLS.get(of.name, rf"{of.symbol}(\Sigma)"),
        dims=tuple(dim for dim in of.dims if dim not in ("scope", "tokens", "estimator")),
        label=f"streamed {of.label}",
        healthy=None,
        basis="invariant",
        null_error=0.0,
        question=__name__.rpartition(".")[2],
        description=description,
        needs=tuple(inspect.signature(function).parameters),
        function=function,
        **stated,
    )
    doc = f"{description}{(of.__doc__ or '')[len(of.description) :]}\n\n{note}"
    object.__setattr__(declared, "__doc__", doc)
    return declared


def _of_spectra(of: Metric) -> Function:
    def measure(streamed_spectra: tuple[Quantities, Quantities]) -> xr.DataArray:
        return _resolved(*(source.call(of.function) for source in streamed_spectra))

    return measure


def _of_similarity(of: Metric) -> Function:
    def measure(streamed_similarity: Quantities) -> xr.DataArray:
        found = streamed_similarity.call(of.function)
        return found.isel(estimator=0, tokens=0)

    return measure


def _null_of_every_token(of: Metric) -> Null:
    """The same of iid noise at the number of tokens that were streamed."""
    null = of.null
    if not callable(null):
        return null

    def expectation(streamed_count: xr.DataArray, eigenvalue: xr.DataArray) -> xr.DataArray:
        source = Quantities(xr.Dataset())
        source.give("noise_rows", streamed_count.where(streamed_count > 0))
        source.give("num_features", eigenvalue.sizes["component"])
        found: xr.DataArray = source.call(null)
        return found

    return expectation


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
