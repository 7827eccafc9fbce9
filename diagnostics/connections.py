"""What becomes of the connections? Mixing matrices of every real token, their products, their reductions.

Shapes: ``C`` connections, ``N`` real tokens, ``n`` streams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import xarray as xr

from diagnostics.kernels import mixing as kernel
from diagnostics.quantities import LABELS, Unavailable, quantity

REDUCTIONS = LABELS["reduction"]
# Tokens of one block of all-pairs products hold about so many numbers.
BLOCK = 2_000_000


class Mixing:
    """Mixing matrices of one chain in float64: one by one, and multiplied from the embedding on.

    Where a connection is not finite it stands as the identity here, and every value that rests on it is NaN.

    Parameters
    ----------
    h_res : DataArray
        Dims (connection, sample, token, stream_out, stream_in).
    mask : DataArray
        Dims (sample, token).
    """

    def __init__(self, h_res: xr.DataArray, mask: xr.DataArray) -> None:
        matrices = real_tokens(h_res.transpose(..., "stream_out", "stream_in"), mask)
        self.finite = np.isfinite(matrices).all(axis=(1, 2, 3))
        matrices[~self.finite] = np.eye(matrices.shape[-1])
        self.matrices = matrices
        self.num_streams = matrices.shape[-1]
        self._coords = connection_coords(h_res)
        self._prefix: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.matrices)

    @property
    def reached(self) -> np.ndarray:
        """Which connections have only finite ones up to them, (C,)."""
        return np.logical_and.accumulate(self.finite)

    @property
    def prefix(self) -> tuple[np.ndarray, np.ndarray]:
        """Products from the embedding through each connection (C, N, n, n) and their log scales (C, N)."""
        if self._prefix is None:
            self._prefix = kernel.prefix_composites(self.matrices, return_log_scale=True)
        return self._prefix

    def reduced(
        self, values: np.ndarray, dims: tuple[str, ...] = (), *, composed: bool = False, **coords: Any
    ) -> xr.DataArray:
        """Reduce values of every token and label them.

        Parameters
        ----------
        values : ndarray
            (C, N, ...): the tokens are the second axis.
        dims : tuple of str
            Names of the further dims.
        composed : bool
            Whether a value rests on every earlier connection too.
        **coords
            Coordinates of the further dims.

        Returns
        -------
        DataArray
            Dims (connection, *dims, reduction).
        """
        found = over_tokens(values)
        found[~(self.reached if composed else self.finite)] = np.nan
        return self.labelled(found, ("connection", *dims, "reduction"), reduction=list(REDUCTIONS), **coords)

    def labelled(self, values: np.ndarray, dims: tuple[str, ...], **coords: Any) -> xr.DataArray:
        """Put the chain's coordinates on values.

        Parameters
        ----------
        values : ndarray
            Any values.
        dims : tuple of str
            Their dims; ``connection`` and ``other_connection`` get the chain's coordinates.
        **coords
            Further coordinates.

        Returns
        -------
        DataArray
        """
        known = dict(self._coords)
        if "other_connection" in dims:
            known["other_connection"] = ("other_connection", np.asarray(known["connection"].values))
        return xr.DataArray(values, dims=dims, coords=known | coords)


def real_tokens(values: xr.DataArray, mask: xr.DataArray) -> np.ndarray:
    """Values of the real tokens in float64, sequences and tokens as one axis.

    Parameters
    ----------
    values : DataArray
        Dims (connection, sample, token, ...).
    mask : DataArray
        Dims (sample, token).

    Returns
    -------
    ndarray
        (C, N, ...).

    Raises
    ------
    Unavailable
        Where the mask leaves no token.
    """
    keep = mask.transpose("sample", "token").values.astype(bool)
    if not keep.any():
        raise Unavailable("the mask leaves no token: every position is marked as padding")
    return values.transpose("connection", "sample", "token", ...).values[:, keep].astype(np.float64)


def connection_coords(values: xr.DataArray) -> dict[str, Any]:
    """Coordinates of the connections that a variable carries.

    Parameters
    ----------
    values : DataArray
        A variable with the dim ``connection``.

    Returns
    -------
    dict
    """
    coords = {str(name): c for name, c in values.coords.items() if c.dims == ("connection",)}
    return {"connection": xr.DataArray(np.arange(values.sizes["connection"]), dims="connection")} | coords


def over_tokens(values: np.ndarray) -> np.ndarray:
    """Mean, median, 1st and 99th percentile and maximum over the tokens, as a last axis.

    Parameters
    ----------
    values : ndarray
        (C, N, ...); infinities stand for what exceeds float64 or for the logarithm of zero.

    Returns
    -------
    ndarray
        (C, ..., reduction) in the order of `REDUCTIONS`.
    """
    # Between infinities nothing can be interpolated.
    method: Literal["linear", "nearest"] = "linear" if np.isfinite(values).all() else "nearest"
    median, low, high = np.quantile(values, [0.5, 0.01, 0.99], axis=1, method=method)
    return np.stack([values.mean(axis=1), median, low, high, values.max(axis=1)], axis=-1)


@quantity
def mixing(h_res: xr.DataArray, mask: xr.DataArray) -> Mixing:
    """The mixing matrices of every real token."""
    if h_res.sizes["stream_in"] == 1:
        raise Unavailable("the run has one stream: nothing mixes")
    return Mixing(h_res, mask)


@quantity
def connection_spectrum(mixing: Mixing) -> np.ndarray:
    """Singular values of every connection, (C, N, n), descending."""
    return kernel.singular_values(mixing.matrices)


@quantity
def eigenvalue_moduli(mixing: Mixing) -> np.ndarray:
    """Magnitudes of the eigenvalues of every connection, (C, N, n), descending."""
    return np.abs(kernel.eigenvalues(mixing.matrices))


@quantity
def read_weights(h_pre: xr.DataArray, mask: xr.DataArray) -> np.ndarray:
    """Weights by which every connection reads the streams, (C, N, n)."""
    return _finite(real_tokens(h_pre, mask), "h_pre")


@quantity
def write_weights(h_post: xr.DataArray, mask: xr.DataArray) -> np.ndarray:
    """Weights by which every connection writes to the streams, (C, N, n)."""
    return _finite(real_tokens(h_post, mask), "h_post")


def _finite(weights: np.ndarray, name: str) -> np.ndarray:
    bad = ~np.isfinite(weights).all(axis=(1, 2))
    if bad.any():
        raise Unavailable(f"{name} is not finite at connection {int(np.argmax(bad))}")
    return weights


@quantity
def mean_depth_kernel(mixing: Mixing, read_weights: np.ndarray, write_weights: np.ndarray) -> np.ndarray:
    """Mean |M| over tokens, (C, C), a block of tokens at a time."""
    if not mixing.finite.all():
        raise Unavailable(f"h_res is not finite at connection {int(np.argmin(mixing.finite))}")
    count, num_tokens = mixing.matrices.shape[:2]
    total, block = np.zeros((count, count)), max(1, 4_000_000 // count**2)
    for start in range(0, num_tokens, block):
        part = slice(start, start + block)
        weights = mixing.matrices[:, part], read_weights[:, part], write_weights[:, part]
        total += np.abs(kernel.depth_kernel(*weights)).sum(axis=0)
    return total / num_tokens


def over_pairs(
    matrices: np.ndarray, measures: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...]
) -> np.ndarray:
    """The largest value over tokens of every product H_b … H_a, a block of tokens at a time.

    Parameters
    ----------
    matrices : ndarray
        (C, N, n, n).
    measures : tuple of function
        Products (..., n, n) and their log scales (...) in, values (...) out.

    Returns
    -------
    ndarray
        (measure, a, b); NaN where a > b.
    """
    count, num_tokens, n, _ = matrices.shape
    table = np.full((len(measures), count, count), np.nan)
    block = max(1, BLOCK // (count * n * n))
    for start in range(0, num_tokens, block):
        for end, products, scales in kernel.pair_columns(matrices[:, start : start + block]):
            for row, measure in zip(table, measures, strict=True):
                row[: end + 1, end] = np.fmax(row[: end + 1, end], measure(products, scales).max(axis=1))
    return table
