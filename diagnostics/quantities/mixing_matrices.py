"""What do the connections do to the streams? Mixing matrices of every real token, their products and reductions.

Shapes: ``C`` connections, ``N`` real tokens, ``n`` streams.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.diagnostics.quantities.registry import LABELS, Unavailable, quantity

REDUCTIONS = LABELS["reduction"]
# Of REDUCTIONS, those that are quantiles: median, p1 and p99.
QUANTILES = (0.5, 0.01, 0.99)
ONE_STREAM = "needs more than one stream; this run has one"
# Numbers of one block of the depth kernel, whose size is tokens × connections²: 32 MB.
BLOCK = 4_000_000

# Matrices that are measured in one call: with few tokens, calls would take longer than what they compute.
AT_ONCE = 4096
# Tokens of one block of products, so that those of all connections need not be in memory at once.
TOKENS = 1024


class Mixing:
    """Mixing matrices of one chain in float64, and multiplied from the embedding on.

    All are in memory: they take less than the states of one depth, whose features are many more than the streams. A connection
    that is not finite is replaced by the identity, and every value computed from it is NaN.

    ``h_res``: dims (connection, sample, token, stream_out, stream_in).
    ``mask``: dims (sample, token).
    """

    def __init__(self, h_res: xr.DataArray, mask: xr.DataArray) -> None:
        self._h_res = h_res.transpose("connection", "sample", "token", "stream_out", "stream_in").variable
        self._real = require_token(mask)
        self.num_streams = h_res.sizes["stream_in"]
        self._labels = connection_labels(h_res)
        # Sequence and position of each token, in the order of the tokens.
        self._positions = np.argwhere(self._real)

    def __len__(self) -> int:
        return int(self._h_res.sizes["connection"])

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self._positions)

    @cached_property
    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        """All matrices, and how many of each connection are not finite."""
        matrices = self._h_res.values[:, self._real].astype(np.float64)
        num_bad = np.logical_not(np.isfinite(matrices).all(axis=(2, 3))).sum(axis=1)
        # LAPACK refuses NaN, and products would carry them on: `reduced` sets what depends on these to NaN.
        matrices[num_bad > 0] = np.eye(matrices.shape[-1])
        # Tokens are the last axis in memory, the second of the view: sums and products over the few streams then
        # run along the tokens and vectorise.
        ordered = np.moveaxis(np.ascontiguousarray(np.moveaxis(matrices, 1, -1)), -1, 1)
        ordered.flags.writeable = False  # a metric that wrote to them would change all later ones
        return ordered, num_bad

    @property
    def matrices(self) -> np.ndarray:
        """All matrices, (C, N, n, n)."""
        return self._read[0]

    @property
    def _parts(self) -> list[slice]:
        """Some connections at a time: what is computed of them takes more than they do."""
        size = max(1, AT_ONCE // self.num_tokens)
        return [slice(start, start + size) for start in range(0, len(self), size)]

    def token_blocks(self) -> list[np.ndarray]:
        """The matrices of all connections (C, t, n, n), a few tokens at a time."""
        # Rounded up: array_split makes blocks of TOKENS or fewer.
        return np.array_split(self.matrices, -(-self.num_tokens // TOKENS), axis=1)

    @property
    def finite(self) -> np.ndarray:
        """Which connections are finite, (C,)."""
        return np.asarray(self._read[1] == 0)

    @property
    def not_finite(self) -> dict[str, int]:
        """How many tokens of each connection that is not finite are not, by its label."""
        return {str(self._labels[c]): int(self._read[1][c]) for c in np.flatnonzero(~self.finite).tolist()}

    @cached_property
    def prefix(self) -> tuple[np.ndarray, np.ndarray]:
        """Products from the embedding through each connection (C, N, n, n) and their log scales (C, N)."""
        # They take as much memory as the matrices again: only where a metric needs them.
        products, log_scales = kernel.prefix_composites(self.matrices, return_log_scale=True)
        return products, log_scales

    def largest_tokens(self, values: np.ndarray) -> list[list[int]]:
        """Sequence and position of the token that has the largest value at each connection.

        ``values``: (C, N); NaN is never the largest.
        """
        tokens = np.where(np.isnan(values), -np.inf, values).argmax(axis=1)
        return [[int(number) for number in self._positions[token]] for token in tokens]

    def each(self, measure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Measure every connection, as many at a time as there is memory for.

        ``measure``: matrices (..., n, n) in, values (..., more) out.
        """
        return np.concatenate([measure(self.matrices[part]) for part in self._parts])

    def each_product(self, measure: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """Measure the products from the embedding on, as many at a time as there is memory for.

        ``measure``: matrices (..., n, n) and their log scales (...) in, values (..., more) out.
        """
        products, scales = self.prefix
        return np.concatenate([measure(products[part], scales[part]) for part in self._parts])

    def reduced(
        self, values: np.ndarray, dims: tuple[str, ...] = (), *, depends_on: str = "itself"
    ) -> xr.Variable:
        """Reduce values of every token.

        ``values``: (C, N, ...): the tokens are the second axis.
        ``depends_on``: which connections besides its own a value is computed from, so that it is NaN where one of them
        is not finite.
        """
        found = over_tokens(values)
        known = self.finite if depends_on == "itself" else np.logical_and.accumulate(self.finite)
        found[~known] = np.nan
        return xr.Variable(("connection", *dims, "reduction"), found)

    def filled(self, value: float) -> xr.Variable:
        """The same number at every connection."""
        return xr.Variable(("connection",), np.full(len(self), value))


def real_tokens(values: xr.DataArray, mask: xr.DataArray) -> np.ndarray:
    """Values of the real tokens in float64, sequences and tokens as one axis."""
    keep = require_token(mask)
    return values.transpose("connection", "sample", "token", ...).values[:, keep].astype(np.float64)


def require_token(mask: xr.DataArray) -> np.ndarray:
    """Which tokens are real, (S, T)."""
    real = mask.transpose("sample", "token").values.astype(bool)
    if not real.any():
        raise Unavailable("the mask leaves no token: every position is marked as padding")
    return real


def connection_labels(values: xr.DataArray) -> np.ndarray:
    """Labels of the connections of a variable."""
    known = values.coords.get("connection")
    return np.arange(values.sizes["connection"]) if known is None else np.asarray(known.values)


def over_tokens(values: np.ndarray) -> np.ndarray:
    """Mean, median, 1st and 99th percentile and maximum over the tokens, as a last axis.

    ``values``: (C, N, ...); infinities are overflow or the logarithm of zero.
    Returns: (C, ..., reduction) in the order of `REDUCTIONS`.
    """
    # A few connections at a time: sorting makes a copy.
    size = max(1, AT_ONCE // max(1, values.shape[1]))
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    return np.concatenate([over_last(np.moveaxis(part, 1, -1)) for part in parts])


def over_last(values: np.ndarray) -> np.ndarray:
    """The reductions over the last axis, which they replace.

    Returns: (..., reduction) in the order of `REDUCTIONS`; NaN where a value is.
    """
    # One sort serves all quantiles, and np.quantile gives NaN next to an infinity.
    ranked = np.sort(values, axis=-1)
    last = ranked.shape[-1] - 1
    # Infinities are values here: their mean may be infinite, or undefined as that of ∞ and −∞.
    with np.errstate(over="ignore", invalid="ignore"):
        mean = values.mean(axis=-1)
        quantiles = [_interpolated(ranked, share * last) for share in QUANTILES]
    return np.stack([mean, *quantiles, ranked[..., -1]], axis=-1)


def _interpolated(ranked: np.ndarray, rank: float) -> np.ndarray:
    """Ranked values at a rank between two integers; the nearer value where one of them is infinite."""
    below, share = int(rank), rank - int(rank)
    low, high = ranked[..., below], ranked[..., min(below + 1, ranked.shape[-1] - 1)]
    value = low + share * (high - low)
    found = np.where(np.isfinite(value), value, low if share < 0.5 else high)
    # NaN is sorted last.
    return np.where(np.isnan(ranked[..., -1]), np.nan, found)


@quantity
def mixing(h_res: xr.DataArray, mask: xr.DataArray) -> Mixing:
    """The mixing matrices of every real token."""
    if h_res.sizes["stream_in"] == 1:
        raise Unavailable(ONE_STREAM)
    return Mixing(h_res, mask)


@quantity
def read_weights(h_pre: xr.DataArray, mask: xr.DataArray) -> np.ndarray:
    """Weights by which every connection reads the streams, (C, N, n)."""
    return require_finite(real_tokens(h_pre, mask), h_pre)


def require_finite(weights: np.ndarray, of: xr.DataArray) -> np.ndarray:
    """Weights (C, N, ...) of connections that are all finite.

    ``of``: the variable that they are of, for the message.
    """
    bad = ~np.isfinite(weights).reshape(len(weights), -1).all(axis=1)
    if bad.any():
        raise Unavailable(f"{of.name} is not finite at connection {connection_labels(of)[np.argmax(bad)]}")
    return weights


def rescaled(values: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
    """Values · e^log_scale, infinite where that exceeds float64."""
    if not log_scale.any():  # the way through the logarithm would round
        return values
    # The logarithm of zero is −∞, of which the exponential makes a zero again.
    with np.errstate(over="ignore", divide="ignore"):
        return np.exp(np.log(values) + log_scale)
