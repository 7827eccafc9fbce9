"""Which singular values does the cloud of tokens have? Some of them by their order, and those of noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import rank
from depthscope.diagnostics.metrics.declaration import metric

# Orders of a spectrum that are stored: 32 in equal steps of their logarithm, and 32 in equal steps. A figure of a spectrum
# has no room for more, and all orders of all depths would be as large as the states.
STEPS = 32


def stored_orders(num_features: int) -> np.ndarray:
    """The orders at which a spectrum is stored: dense at the top, even over the bulk.

    They do not depend on the tokens, so that padding and left-out sequences change none.

    ``num_features``: the most singular values that there can be.
    Returns: Growing, from 1 to the number of features; all of them where they are few.

    Examples
    --------
    >>> stored_orders(4).tolist()
    [1, 2, 3, 4]
    """
    parts = np.geomspace(1, num_features, STEPS), np.linspace(1, num_features, STEPS)
    return np.unique(np.round(np.concatenate(parts)).astype(int))


@lru_cache(maxsize=4096)
def _spectrum_of_noise(count: int, width: int) -> np.ndarray:
    """The expected singular values of noise, of energy 1."""
    expected = rank.marchenko_pastur(count, width).singular_values()
    return expected / np.linalg.norm(expected)


def _at_stored_orders(
    singular_values: xr.Variable,
    token_counts: xr.Variable,
    num_features: int,
    centering: tuple[str, ...],
    measure: Callable[[np.ndarray, int], np.ndarray],
) -> xr.DataArray:
    """What is measured of every spectrum of the mean over streams, at the stored orders; NaN beyond the rank."""
    # The first view is the mean over streams.
    spectra = singular_values.isel(stream=0).transpose("depth", "tokens", "centering", "group", "component")
    orders = stored_orders(num_features)
    # An empty sequence has NaN: zero rows, so that no order is within its rank.
    rows = token_counts.transpose("tokens", "group").fillna(0).astype(int).values
    found = np.full((*spectra.shape[:-1], len(orders)), np.nan)
    for t, c, g in np.ndindex(spectra.shape[1:4]):
        # Removing the mean makes one singular value zero by construction.
        count = int(rows[t, g]) - (centering[c] == "centred")
        inside = orders[orders <= min(count, num_features)]
        if inside.size:
            # Orders count from 1, indices from 0.
            values = measure(spectra.values[:, t, c, g], count)[:, inside - 1]
            found[:, t, c, g, : inside.size] = values
    return xr.DataArray(found, {"order": orders}, (*spectra.dims[:-1], "order"))


def _scaled_spectrum_of_noise(
    singular_values: xr.Variable,
    token_counts: xr.Variable,
    num_features: int,
    centering: tuple[str, ...],
) -> xr.DataArray:
    """The Marchenko-Pastur law at that number of tokens and features, scaled to the energy of the states."""

    def measure(values: np.ndarray, count: int) -> np.ndarray:
        energy = np.linalg.norm(values, axis=-1, keepdims=True)
        return energy * _spectrum_of_noise(count, num_features)

    return _at_stored_orders(singular_values, token_counts, num_features, centering, measure)


@metric(
    symbol=r"\sigma_i",
    dims="scope tokens centering depth order",
    scale="log",
    units="activation",
    cite="marchenko1967distribution",
    basis="stream",
    null=_scaled_spectrum_of_noise,
    null_cite="marchenko1967distribution",
    estimator="of the mean over streams; within a sequence: mean over sequences of the value of that order",
    null_error=0.03,
)
def singular_value(
    singular_values: xr.Variable,
    token_counts: xr.Variable,
    num_features: int,
    centering: tuple[str, ...],
) -> xr.DataArray:
    r"""Singular values of the states, by their order: 1 is the largest.

    .. math:: X = U\, \mathrm{diag}(\sigma)\, V^\top

    Of large spectra some orders are stored: the first ones, and even steps over all. NaN beyond min(N, d).
    """
    return _at_stored_orders(
        singular_values, token_counts, num_features, centering, lambda values, count: values
    )
