"""Can the statistics of a block of tokens be had in one pass? By numba, where it is installed; torch takes one for each.

Shapes: t the tokens of a block, N stream, V view (the mean over several streams, then each of them), D feature.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but its sign
SMALLEST = 1e-30  # norms below: one over them may exceed float32


class CompiledBlock(NamedTuple):
    """What one pass gives; arrays as those of `token_sums`."""

    norm_tV: torch.Tensor
    largest_tV: torch.Tensor
    feature_sum_VD: torch.Tensor
    unit_sum_VD: torch.Tensor
    cosine_tV: torch.Tensor | None
    unit_tVD: torch.Tensor
    pair_cosine_tNN: torch.Tensor | None


def is_available() -> bool:
    """Whether numba is installed and works."""
    return _kernels() is not None


def compiled_block(
    x_tND: torch.Tensor, previous_unit_tVD: torch.Tensor | None, *, is_exact: bool = False
) -> CompiledBlock:
    """Statistics of a block of tokens on the CPU, in one pass over it.

    Parameters
    ----------
    x_tND : Tensor
        float32, zero on padding.
    previous_unit_tVD : Tensor or None
        Unit vectors of the same tokens one depth before; overwritten by those of this one.
    is_exact : bool
        Add vectors over tokens in float64.

    Returns
    -------
    CompiledBlock
        Equal to what torch gives up to the rounding of float32.
    """
    kernels = _kernels()
    assert kernels is not None
    x = x_tND.contiguous().numpy()
    t, N, D = x.shape
    V = N + 1 if N > 1 else 1
    unit = previous_unit_tVD.numpy() if previous_unit_tVD is not None else np.empty((t, V, D), np.float32)
    norm, largest = np.empty((t, V)), np.empty((t, V), np.int32)
    dtype = np.float64 if is_exact else np.float32  # numba compiles the function for each
    feature_sum, unit_sum = np.zeros((V, D), dtype), np.zeros((V, D), dtype)
    cosine, pairs = np.zeros((t, V)), np.zeros((t, N, N))
    kernels.statistics(
        x,
        x.view(np.int32),
        previous_unit_tVD is not None,
        unit,
        norm,
        largest,
        feature_sum,
        unit_sum,
        cosine,
        pairs,
    )
    return CompiledBlock(
        torch.from_numpy(norm),
        torch.from_numpy(largest.view(np.float32)),
        torch.from_numpy(feature_sum),
        torch.from_numpy(unit_sum),
        None if previous_unit_tVD is None else torch.from_numpy(cosine),
        torch.from_numpy(unit),
        torch.from_numpy(pairs) if N > 1 else None,
    )


def compiled_squares(x_tND: torch.Tensor) -> torch.Tensor:
    """Sums of squares over tokens and features, (V,), in float64: of the mean over several streams, then of each.

    Parameters
    ----------
    x_tND : Tensor
        float32.

    Returns
    -------
    Tensor
    """
    kernels = _kernels()
    assert kernels is not None
    x = x_tND.contiguous().numpy()
    sums = np.zeros(x.shape[1] + 1 if x.shape[1] > 1 else 1)
    kernels.squares(x, sums)
    return torch.from_numpy(sums)


class _Kernels(NamedTuple):
    statistics: Callable[..., Any]
    squares: Callable[..., Any]


@cache
def _kernels() -> _Kernels | None:
    """The compiled functions; None where numba is not installed, or fails to compile on this machine."""
    try:
        import numba

        # Sums may be reordered, so that they become vectors; NaN and infinities keep their meaning.
        compiled = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
        kernels = _Kernels(compiled(_statistics), compiled(_squares))
        # Compiled now, for the types that come later.
        x = np.ones((1, 2, 4), np.float32)
        kernels.squares(x, np.zeros(3))
        unit, sums = np.ones((1, 3, 4), np.float32), np.zeros((2, 3, 4), np.float32)
        counts = np.zeros((1, 3), np.int32)
        kernels.statistics(
            x, x.view(np.int32), False, unit, np.zeros((1, 3)), counts, sums[0], sums[1], np.zeros((1, 3)),
            np.zeros((1, 2, 2)),
        )  # fmt: skip
    except Exception:  # numba missing, too old for this Python, or without a folder to write to
        return None
    return kernels


def _statistics(  # noqa: C901  one loop over tokens: compiled, and a function of each part would be a call for each token
    x: np.ndarray,
    bits: np.ndarray,
    has_previous: bool,
    unit: np.ndarray,
    norm: np.ndarray,
    largest: np.ndarray,
    feature_sum: np.ndarray,
    unit_sum: np.ndarray,
    cosine: np.ndarray,
    pairs: np.ndarray,
) -> None:
    """Fill the arrays with the statistics of ``x``; ``bits`` are its float32 as integers."""
    T, N, D = x.shape
    V = unit.shape[1]
    first = V - N
    mean = np.empty(D, np.float32)
    mean_bits = mean.view(np.int32)
    total = np.empty(D, np.float64)
    for t in range(T):
        if first:
            # In float64: of streams that nearly cancel, the rounding would be the mean.
            for d in range(D):
                total[d] = x[t, 0, d]
            for n in range(1, N):
                for d in range(D):
                    total[d] += x[t, n, d]
            for d in range(D):
                mean[d] = total[d] / N
        for v in range(V):
            row = mean if first and v == 0 else x[t, v - first]
            row_bits = mean_bits if first and v == 0 else bits[t, v - first]
            # As integers without a sign, magnitudes are ordered as floats are, infinities and NaN at the end.
            most = np.int32(0)
            for d in range(D):
                most = max(most, row_bits[d] & np.int32(MAGNITUDE))
            largest[t, v] = most
            square = 0.0  # float64, in which no square of a float32 overflows or underflows
            for d in range(D):
                square += np.float64(row[d]) * np.float64(row[d])
            length = np.sqrt(square)
            norm[t, v] = length
            before = np.float32(0.0)
            if length == 0.0:
                for d in range(D):
                    unit[t, v, d] = np.float32(0.0)
                continue
            # One loop for each case: conditions inside of it, or a second pass, would take half as long again.
            if length < SMALLEST:
                for d in range(D):
                    of_unit = np.float32(np.float64(row[d]) / length)
                    if has_previous:
                        before += of_unit * unit[t, v, d]
                    unit[t, v, d] = of_unit
                    feature_sum[v, d] += row[d]
                    unit_sum[v, d] += of_unit
            elif has_previous:
                inverse = np.float32(1.0 / length)
                for d in range(D):
                    of_unit = row[d] * inverse
                    before += of_unit * unit[t, v, d]
                    unit[t, v, d] = of_unit
                    feature_sum[v, d] += row[d]
                    unit_sum[v, d] += of_unit
            else:
                inverse = np.float32(1.0 / length)
                for d in range(D):
                    of_unit = row[d] * inverse
                    unit[t, v, d] = of_unit
                    feature_sum[v, d] += row[d]
                    unit_sum[v, d] += of_unit
            cosine[t, v] = before
        if first:
            for i in range(N):
                length = norm[t, first + i]
                # 1, and NaN where a vector is not finite; a stream of zeros has no direction.
                pairs[t, i, i] = length / length if length != 0.0 else 0.0
                for j in range(i):
                    lengths = length * norm[t, first + j]
                    # In float64: whether streams are the same numbers, or have begun to part, is told by 1 − cosine.
                    product = 0.0
                    for d in range(D):
                        product += np.float64(x[t, i, d]) * np.float64(x[t, j, d])
                    pairs[t, i, j] = product / lengths if lengths != 0.0 else 0.0
                    pairs[t, j, i] = pairs[t, i, j]


def _squares(x: np.ndarray, sums: np.ndarray) -> None:
    """Add the sums of squares of ``x`` to ``sums``."""
    T, N, D = x.shape
    first = len(sums) - N
    total = np.empty(D)
    for t in range(T):
        total[:] = 0.0
        for n in range(N):
            square = 0.0
            if first:
                for d in range(D):
                    value = np.float64(x[t, n, d])
                    square += value * value
                    total[d] += value
            else:
                for d in range(D):
                    square += np.float64(x[t, n, d]) * np.float64(x[t, n, d])
            sums[first + n] += square
        if first:
            square = 0.0
            for d in range(D):
                square += total[d] * total[d]
            sums[0] += square / (N * N)
