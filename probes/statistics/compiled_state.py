"""Can the statistics of a state be had in one pass? By numba, where it is installed; torch takes one for each of them.

Shapes: B batch, T token, t = B T, K some tokens, N stream, V view (the mean over several streams, then each of them), D
feature. A state is read where it lies, whatever the order of its axes in memory: a copy would take half as long as the pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but its sign
SMALLEST = 1e-30  # norms below: one over them may exceed float32
# So many vectors are added in float32 before the sum goes to one in float64; a rounding of 6e-8 each is then no more than that
# of the vectors themselves.
ADDED = 256


class CompiledState(NamedTuple):
    """What one pass gives; the pairs of streams are those of `probes.statistics.live_sums.stream_cosine_sums`."""

    norm_tV: torch.Tensor
    largest_tV: torch.Tensor
    feature_sum_VD: torch.Tensor
    unit_sum_VD: torch.Tensor
    cosine_sum_V: torch.Tensor | None
    unit_tVD: torch.Tensor
    pair_cosine_sum_NN: torch.Tensor
    # Mean over pairs, tokens with two streams, tokens with all.
    stream_cosine_sums: tuple[float, float, float]


class _Flat(NamedTuple):
    """A state as the memory that it lies in, and where its tokens are there."""

    memory: np.ndarray
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int]  # of B, T and N; features are neighbours


def is_available() -> bool:
    """Whether numba is installed and works."""
    return _kernels() is not None


def compiled_state(
    x_BTND: torch.Tensor,
    real_BT: torch.Tensor | None,
    previous_unit_tVD: torch.Tensor | None,
    *,
    with_mean: bool = True,
    is_exact: bool = False,
) -> CompiledState:
    """Statistics of a state on the CPU, in one pass over it.

    ``real_BT``: true on real tokens; the others are taken for zeros.
    ``previous_unit_tVD``: unit vectors of the same tokens one depth before; overwritten by those of this one.
    ``with_mean``: whether the mean over several streams is a view too, and their cosines are added.
    Returns: Equal to what torch gives up to the rounding of float32.
    """
    flat = _flat(x_BTND)
    B, T, N, D = flat.shape
    t, V = B * T, N + 1 if N > 1 and with_mean else N
    unit = previous_unit_tVD.numpy() if previous_unit_tVD is not None else np.empty((t, V, D), np.float32)
    norm, largest = np.empty((t, V)), np.empty((t, V), np.int32)
    sums, cosine, pairs, counts = np.zeros((2, V, D)), np.zeros(V), np.zeros((N, N)), np.zeros(3)
    # numba compiles the function for each type
    begun = np.zeros((2, V, D), np.float64 if is_exact else np.float32)
    _compiled().state(
        flat.memory,
        flat.memory.view(np.int32),
        flat.shape,
        flat.strides,
        _real(real_BT),
        previous_unit_tVD is not None,
        unit,
        norm,
        largest,
        sums,
        begun,
        cosine,
        pairs,
        counts,
    )
    return CompiledState(
        torch.from_numpy(norm),
        torch.from_numpy(largest.view(np.float32)),
        torch.from_numpy(sums[0]),
        torch.from_numpy(sums[1]),
        None if previous_unit_tVD is None else torch.from_numpy(cosine),
        torch.from_numpy(unit),
        torch.from_numpy(pairs),
        (float(counts[0]), float(counts[1]), float(counts[2])),
    )


def compiled_squares(
    x_BTND: torch.Tensor, real_BT: torch.Tensor | None, *, with_mean: bool = True
) -> torch.Tensor:
    """Sums of squares over features, (t, V), in float64: of the mean over several streams, then of each.

    ``x_BTND``: A state, or the gradient of one.
    ``real_BT``: true on real tokens; the others are taken for zeros.
    ``with_mean``: whether the mean over several streams is a view too.
    """
    flat = _flat(x_BTND)
    B, T, N, _ = flat.shape
    squares = np.zeros((B * T, N + 1 if N > 1 and with_mean else N))
    _compiled().squares(flat.memory, flat.shape, flat.strides, _real(real_BT), squares)
    return torch.from_numpy(squares)


def compiled_tokens(x_BTND: torch.Tensor, position_K: torch.Tensor) -> torch.Tensor:
    """A float32 copy of some tokens of a state, (K, N, D)."""
    flat = _flat(x_BTND)
    found = np.empty((len(position_K), *flat.shape[2:]), np.float32)
    _compiled().tokens(flat.memory, flat.shape, flat.strides, position_K.numpy(), found)
    return torch.from_numpy(found)


def _flat(x_BTND: torch.Tensor) -> _Flat:
    x = x_BTND.detach()
    if x.dtype is not torch.float32 or x.stride(-1) != 1:
        x = x.to(torch.float32, memory_format=torch.contiguous_format).contiguous()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    B, T, N, D = x.shape
    return _Flat(x.as_strided((extent,), (1,)).numpy(), (B, T, N, D), (x.stride(0), x.stride(1), x.stride(2)))


def _real(real_BT: torch.Tensor | None) -> np.ndarray:
    """Which tokens are real, (t,); empty where all are."""
    return np.empty(0, bool) if real_BT is None else real_BT.flatten().numpy()


class _Kernels(NamedTuple):
    state: Callable[..., Any]
    squares: Callable[..., Any]
    tokens: Callable[..., Any]


def _compiled() -> _Kernels:
    kernels = _kernels()
    assert kernels is not None
    return kernels


@cache
def _kernels() -> _Kernels | None:
    """The compiled functions; None where numba is not installed, or fails to compile on this machine."""
    try:
        import numba
        from numba.extending import register_jitable

        # Sums may be reordered, so that they become vectors; NaN and infinities keep their meaning.
        fastmath = {"reassoc", "contract", "nsz"}
        compiled = numba.njit(nogil=True, cache=True, fastmath=fastmath)
        # In place: a call for each token would take a fifth longer where there are few features.
        for part in (_fill_mean, _add_vector, _add_begun, _add_pairs):
            register_jitable(fastmath=fastmath, inline="always")(part)
        kernels = _Kernels(compiled(_state), compiled(_squares), compiled(_tokens))
        # Compiled now, for the types that come later.
        x, shape, strides, real = np.ones(8, np.float32), (1, 1, 2, 4), (8, 8, 4), np.empty(0, bool)
        unit, counts = np.ones((1, 3, 4), np.float32), np.zeros((1, 3), np.int32)
        kernels.state(
            x, x.view(np.int32), shape, strides, real, False, unit, np.zeros((1, 3)), counts, np.zeros((2, 3, 4)),
            np.zeros((2, 3, 4), np.float32), np.zeros(3), np.zeros((2, 2)), np.zeros(3),
        )  # fmt: skip
        kernels.squares(x, shape, strides, real, np.zeros((1, 3)))
        kernels.tokens(x, shape, strides, np.zeros(1, np.int64), np.zeros((1, 2, 4), np.float32))
    except Exception:  # numba missing, too old for this Python, or without a folder to write to
        return None
    return kernels


def _state(
    x: np.ndarray,
    bits: np.ndarray,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int],
    real: np.ndarray,
    has_previous: bool,
    unit: np.ndarray,
    norm: np.ndarray,
    largest: np.ndarray,
    sums: np.ndarray,
    begun: np.ndarray,
    cosine: np.ndarray,
    pairs: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Fill the arrays with the statistics of a state; ``bits`` are its float32 as integers."""
    B, T, N, D = shape
    V = unit.shape[1]
    first = V - N
    wide = np.empty((N, D), np.float64)
    total = np.empty(D, np.float64)
    mean = np.empty(D, np.float32)
    mean_bits = mean.view(np.int32)
    of_token = np.empty((N, N), np.float64)
    added = 0
    for t in range(B * T):
        if len(real) and not real[t]:
            norm[t] = 0.0
            largest[t] = 0
            unit[t] = np.float32(0.0)
            continue
        start = (t // T) * strides[0] + (t % T) * strides[1]
        if first:
            _fill_mean(x, start, strides[2], wide, total, mean)
        for v in range(V):
            place = start + (v - first) * strides[2]
            row = mean if first and v == 0 else x[place : place + D]
            row_bits = mean_bits if first and v == 0 else bits[place : place + D]
            # As integers without a sign, magnitudes are ordered as floats are, infinities and NaN at the end.
            most = np.int32(0)
            for d in range(D):
                most = max(most, row_bits[d] & np.int32(MAGNITUDE))
            largest[t, v] = most
            # Rows of their own, so that their memory is known to be one after another.
            norm[t, v], before = _add_vector(row, unit[t, v], begun[0, v], begun[1, v], has_previous)
            cosine[v] += before
        added += 1
        if added == ADDED:
            _add_begun(sums, begun)
            added = 0
        if first:
            _add_pairs(wide, norm[t, first:], of_token, pairs, counts)
    _add_begun(sums, begun)


def _fill_mean(
    x: np.ndarray, start: int, stride: int, wide: np.ndarray, total: np.ndarray, mean: np.ndarray
) -> None:
    """Fill in the streams of a token and their mean, in float64: of streams that nearly cancel, rounding would be the mean."""
    N, D = wide.shape
    total[:] = 0.0
    for n in range(N):
        place = start + n * stride
        row = x[place : place + D]
        of_stream = wide[n]
        for d in range(D):
            of_stream[d] = row[d]
            total[d] += of_stream[d]
    for d in range(D):
        mean[d] = total[d] / N


def _add_vector(  # noqa: C901  one loop for each case
    row: np.ndarray, unit_row: np.ndarray, feature_row: np.ndarray, sum_row: np.ndarray, has_previous: bool
) -> tuple[float, np.float32]:
    """Add a vector and its direction; its norm, and its cosine with the one whose direction was in ``unit_row``."""
    D = len(row)
    square = 0.0  # float64, in which no square of a float32 overflows or underflows
    for d in range(D):
        square += np.float64(row[d]) * np.float64(row[d])
    length = np.sqrt(square)
    before = np.float32(0.0)
    if length == 0.0:
        for d in range(D):
            unit_row[d] = np.float32(0.0)
        return length, before
    # One loop for each case: conditions inside of it, or a second pass, would take half as long again.
    if length < SMALLEST:
        for d in range(D):
            of_unit = np.float32(np.float64(row[d]) / length)
            if has_previous:
                before += of_unit * unit_row[d]
            unit_row[d] = of_unit
            feature_row[d] += row[d]
            sum_row[d] += of_unit
        return length, before
    inverse = np.float32(1.0 / length)
    if has_previous:
        for d in range(D):
            of_unit = row[d] * inverse
            before += of_unit * unit_row[d]
            unit_row[d] = of_unit
            feature_row[d] += row[d]
            sum_row[d] += of_unit
    else:
        for d in range(D):
            of_unit = row[d] * inverse
            unit_row[d] = of_unit
            feature_row[d] += row[d]
            sum_row[d] += of_unit
    return length, before


def _add_begun(sums: np.ndarray, begun: np.ndarray) -> None:
    """Add the sums of the last vectors, which begin anew."""
    for part in range(2):
        for v in range(begun.shape[1]):
            for d in range(begun.shape[2]):
                sums[part, v, d] += begun[part, v, d]
                begun[part, v, d] = 0.0


def _add_pairs(
    wide: np.ndarray, norm: np.ndarray, of_token: np.ndarray, pairs: np.ndarray, counts: np.ndarray
) -> None:
    """Add the cosines of every two streams of a token."""
    N, D = wide.shape
    directed, mean_cosine = 0, 0.0
    for i in range(N):
        length = norm[i]
        # 1, and NaN where a vector is not finite; a stream of zeros has no direction.
        of_token[i, i] = length / length if length != 0.0 else 0.0
        directed += length > 0.0
        mean_cosine += of_token[i, i]
        for j in range(i):
            lengths = length * norm[j]
            # In float64: whether streams are the same numbers, or have begun to part, is seen from 1 − cosine.
            one, other, product = wide[i], wide[j], 0.0
            for d in range(D):
                product += one[d] * other[d]
            of_token[i, j] = product / lengths if lengths != 0.0 else 0.0
            of_token[j, i] = of_token[i, j]
            mean_cosine += 2.0 * of_token[i, j]
    if directed > 1:
        counts[0] += (mean_cosine - directed) / (directed * (directed - 1))
        counts[1] += 1.0
    if directed == N:
        counts[2] += 1.0
        for i in range(N):
            for j in range(N):
                pairs[i, j] += of_token[i, j]


def _squares(  # noqa: C901  as of `_state`
    x: np.ndarray,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int],
    real: np.ndarray,
    squares: np.ndarray,
) -> None:
    """Fill (t, V) with sums of squares; it holds zeros."""
    B, T, N, D = shape
    first = squares.shape[1] - N
    total = np.empty(D)
    for t in range(B * T):
        if len(real) and not real[t]:
            continue
        start = (t // T) * strides[0] + (t % T) * strides[1]
        total[:] = 0.0
        for n in range(N):
            place = start + n * strides[2]
            row = x[place : place + D]
            square = 0.0
            if first:
                for d in range(D):
                    value = np.float64(row[d])
                    square += value * value
                    total[d] += value
            else:
                for d in range(D):
                    square += np.float64(row[d]) * np.float64(row[d])
            squares[t, first + n] = square
        if first:
            square = 0.0
            for d in range(D):
                square += total[d] * total[d]
            squares[t, 0] = square / (N * N)


def _tokens(
    x: np.ndarray,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int],
    position: np.ndarray,
    found: np.ndarray,
) -> None:
    """Fill (K, N, D) with some tokens."""
    _, T, N, D = shape
    for k in range(len(position)):
        start = (position[k] // T) * strides[0] + (position[k] % T) * strides[1]
        for n in range(N):
            place = start + n * strides[2]
            found[k, n] = x[place : place + D]
