"""Which spectrum do the states have at some depths? Singular values by order, and the density of the eigenvalues."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from depthscope.app.figures.build.captions import caption_of
from depthscope.app.figures.build.values import fed, names_of, pick
from depthscope.app.figures.build.words import describe_lines, label_of
from depthscope.app.figures.specification import Analyses, Array, Line, Lines, Selection

__all__ = ["build_density", "build_spectrum"]

NUM_DEPTHS = 5
NUM_BINS = 20
_METRIC = "singular_value"
_NOISE = "Dashed: the Marchenko-Pastur law, independent noise of the same shape and energy."


def build_spectrum(analyses: Analyses, **selection: Any) -> Lines:
    """Singular values by order at some depths, with those of noise of the same energy.

    Parameters
    ----------
    analyses : mapping
        Run name → analysis.
    **selection : str, int or tuple of int
        Fields of `Selection`; `depths` names the depths.

    Returns
    -------
    Lines
    """
    choice = Selection.of(selection)
    lines = [line for found in _spectra(analyses, choice) for line in _lines(found, _by_order)]
    return _assemble(
        "spectrum",
        "Singular values of the states",
        ("order (1 = largest)", label_of(analyses, _METRIC, "singular value")),
        lines,
        analyses,
        choice,
        "Not drawn below the rounding of float32.",
    )


def build_density(analyses: Analyses, **selection: Any) -> Lines:
    """Density of the eigenvalues per decade at some depths, with that of noise of the same energy.

    Parameters
    ----------
    analyses : mapping
        Run name → analysis.
    **selection : str, int or tuple of int
        Fields of `Selection`; `depths` names the depths.

    Returns
    -------
    Lines
    """
    choice = Selection.of(selection)
    lines = [line for found in _spectra(analyses, choice) for line in _lines(found, _density)]
    return _assemble(
        "spectral_density",
        "Density of the eigenvalues of the states",
        ("eigenvalue of XᵀX", "share of the eigenvalues per decade"),
        lines,
        analyses,
        choice,
        "Eigenvalues beyond the ends of the dashed curve, the edges of noise, are structure.",
    )


_Curve = Callable[[Array, Array], tuple[Array, Array]]


class _Spectrum(NamedTuple):
    """The spectrum of one run at one depth, its standard error and that of noise."""

    run: str
    label: str
    place: str
    values: xr.DataArray
    error: xr.DataArray | None
    null: xr.DataArray | None


def _spectra(analyses: Analyses, choice: Selection) -> Iterator[_Spectrum]:
    """The spectra of every run at every depth shown."""
    for run, data, array in fed(analyses, _METRIC, choice):
        error, null = (pick(data, f"{_METRIC}_{part}", choice) for part in ("stderr", "null"))
        names = names_of(array, "depth")
        for depth in _depths(array, choice):
            beside = [None if part is None else part.isel(depth=depth) for part in (error, null)]
            label = f"depth {depth}" if len(analyses) == 1 else f"{run} · depth {depth}"
            yield _Spectrum(run, label, names[depth], array.isel(depth=depth), *beside)


def _depths(array: xr.DataArray, choice: Selection) -> list[int]:
    """The depths that were chosen and exist, or some from the first to the last."""
    last = array.sizes["depth"] - 1
    if choice.depths:
        return [depth for depth in choice.depths if 0 <= depth <= last]
    return sorted({round(place) for place in np.linspace(0, last, NUM_DEPTHS)})


def _lines(spectrum: _Spectrum, curve: _Curve) -> list[Line]:
    """The measured spectrum and that of noise behind it, at the orders that the states can have."""
    run, label, place = spectrum.run, spectrum.label, spectrum.place
    sigma, error, noise = (_numbers(part, spectrum.values) for part in spectrum[3:])
    reached = np.isfinite(sigma) | np.isfinite(noise)
    orders = np.asarray(spectrum.values["order"].values, dtype=np.float64)[reached]
    sigma, error, noise = sigma[reached], error[reached], noise[reached]
    floor = _rounding(sigma, orders)
    sigma = np.where(sigma > floor, sigma, np.nan)
    x, y = curve(orders, sigma)
    known = curve is _by_order and bool(np.isfinite(error).any())
    band = (np.maximum(sigma - error, floor), sigma + error) if known else (None, None)
    lines = [Line(x, y, label, lower=band[0], upper=band[1], group=run, text=[place] * len(x))]
    if np.isfinite(noise).any():
        lines.append(Line(*curve(orders, noise), f"{label} · null", role="null", group=run))
    return lines


def _numbers(part: xr.DataArray | None, like: xr.DataArray) -> Array:
    """The numbers of one slice; NaN where the analysis has none."""
    return np.full(like.shape, np.nan) if part is None else np.asarray(part.values, dtype=np.float64)


def _rounding(sigma: Array, orders: Array) -> float:
    """Up to where float32 states cannot tell a singular value from zero."""
    known = np.isfinite(sigma)
    if not known.any():
        return 0.0
    return float(np.finfo(np.float32).eps * orders[known].max() * sigma[known].max())


def _by_order(orders: Array, sigma: Array) -> tuple[Array, Array]:
    """A spectrum by order, as it is."""
    return orders, sigma


def _density(orders: Array, sigma: Array) -> tuple[Array, Array]:
    """Share of the eigenvalues between two orders over the decades between them, at their middle."""
    ends = _bins(orders)
    if len(ends) < 2:
        return np.zeros(0), np.zeros(0)
    energy, share = np.log10(sigma[ends] ** 2), np.diff(orders[ends]) / orders[-1]
    width, middle = energy[:-1] - energy[1:], 0.5 * (energy[:-1] + energy[1:])
    known = width > 1e-9
    return 10 ** middle[known][::-1], (share[known] / width[known])[::-1]


def _bins(orders: Array) -> list[int]:
    """Places of the orders between which eigenvalues are counted: near at the top, a few per cent of all below."""
    ends = [0]
    for place, order in enumerate(orders):
        if order - orders[ends[-1]] >= min(0.5 * order, orders[-1] / NUM_BINS):
            ends.append(place)
    return ends


def _assemble(
    name: str,
    title: str,
    axes: tuple[str, str],
    lines: list[Line],
    analyses: Analyses,
    choice: Selection,
    said: str,
) -> Lines:
    """The figure around its lines."""
    null = any(line.role == "null" for line in lines)
    words = (
        "Of the mean over streams."
        if any(data.sizes.get("stream", 1) > 1 for data in analyses.values())
        else "",
        "Band: ± one standard error over sequences." if any(line.lower is not None for line in lines) else "",
        _NOISE if null else "",
        said,
    )
    measured = [line for line in lines if line.role == "measured"]
    caption = caption_of(_METRIC, analyses, choice, measured, scope=choice.scope, said=words)
    return Lines(
        name=name,
        title=title,
        x_label=axes[0],
        y_label=axes[1],
        lines=tuple(lines),
        log_y=True,
        log_x=True,
        caption=caption,
        alt=describe_lines(tuple(lines), title, axes[0].partition(" (")[0]),
        metric=_METRIC,
        sources=("marchenko1967distribution",) if null else (),
    )
