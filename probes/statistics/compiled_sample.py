"""What do the sampled tokens of a depth show one by one? Their sizes and directions, each in one compiled pass.

By numba, where it is installed; numpy gives the same numbers elsewhere.
Shapes: L depth, K token, N stream, V view (the mean over several streams, then each of them), D feature.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from depthscope.probes.statistics.live_sums import with_mean

MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but its sign


class _Kernels(NamedTuple):
    sizes: Callable[..., Any]
    near_median: Callable[..., Any]
    units: Callable[..., Any]


@cache
def _kernels() -> _Kernels | None:
    """The compiled functions; None where numba is not installed, or fails to compile on this machine."""
    try:
        import numba

        compiled = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
        kernels = _Kernels(compiled(_sizes), compiled(_near_median), compiled(_units))
        # Compiled now, for the types that come later.
        x, mean, magnitude = (
            np.ones((1, 2, 4), np.float32),
            np.empty((1, 4), np.float32),
            np.empty((3, 4), np.int32),
        )
        kernels.sizes(
            x, x.view(np.int32), mean, mean.view(np.int32), np.empty((1, 3)), magnitude, np.zeros(3, int)
        )
        kernels.near_median(magnitude[0], 1, magnitude[1], np.zeros(3, int))
        kernels.units(np.ones((2, 1, 4), np.float32), np.empty((1, 2, 4)), np.empty((1, 2)), np.empty((1, 1)))
    except Exception:  # numba missing, too old for this Python, or without a folder to write to
        return None
    return kernels


def token_sizes(states_KND: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean over streams of some tokens, and how large they are.

    Returns: The mean (K, D), float32; norms (K, V) of the views; and the median (V,) of the magnitudes that are not
    zero, NaN where all are.
    """
    K, N, D = states_KND.shape
    V = N + 1 if N > 1 else 1
    kernels = _kernels()
    if kernels is None:
        views = with_mean(torch.from_numpy(states_KND)).numpy()
        norms = np.sqrt(np.square(views, dtype=np.float64).sum(axis=-1))
        sizes = np.abs(views).swapaxes(0, 1).reshape(V, K * D)
        return views[:, 0], norms, _medians(sizes, np.count_nonzero(sizes, axis=1))
    states = np.ascontiguousarray(states_KND)
    mean, norms = np.empty((K, D), np.float32), np.empty((K, V))
    magnitudes, numbers = np.empty((V, K * D), np.int32), np.zeros(V, int)
    kernels.sizes(states, states.view(np.int32), mean, mean.view(np.int32), norms, magnitudes, numbers)
    medians = np.full(V, np.nan)
    near, below = np.empty(K * D, np.int32), np.empty(3, int)
    for v in np.flatnonzero(numbers):
        kernels.near_median(magnitudes[v], K * D - numbers[v] + numbers[v] // 2, near, below)
        first, count, largest = below.tolist()
        ranked = np.partition(near[:count], first)
        upper = ranked[first : first + 1].view(np.float32)[0]
        lower = ranked[:first].max() if first else np.int32(largest)
        pair = float(upper), float(upper if numbers[v] % 2 else lower.view(np.float32))
        medians[v] = sum(pair) / 2.0
    return mean, norms, medians


def _medians(sizes_VM: np.ndarray, numbers_V: np.ndarray) -> np.ndarray:
    """The median of those sizes of every view that are not zero, and how many these are; NaN where there is none."""
    medians = np.full(len(sizes_VM), np.nan)
    for v, (sizes, number) in enumerate(zip(sizes_VM, numbers_V, strict=True)):
        if number:
            # Zeros are the smallest: of a state after a ReLU most entries are, and so would the median be.
            middle = len(sizes) - number + number // 2
            ranked = np.partition(sizes, middle)
            upper = float(ranked[middle])
            medians[v] = upper if number % 2 else (upper + float(ranked[:middle].max())) / 2.0
    return medians


def unit_tokens(states_LKD: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directions of tokens at every depth, and how far each depth turns them.

    Returns: Unit vectors (K, L, D) in float64, zero where the state is; whether a token has a direction, (K, L); and 1
    − cos between successive depths, (K, L − 1), by the difference of unit vectors, which does not cancel for blocks
    that turn states by little.
    """
    L, K, D = states_LKD.shape
    kernels = _kernels()
    if kernels is not None:
        unit, length = np.empty((K, L, D)), np.empty((K, L))
        turned = np.empty((K, L - 1))
        kernels.units(np.ascontiguousarray(states_LKD), unit, length, turned)
        return unit, length > 0, turned
    tokens = states_LKD.swapaxes(0, 1).astype(np.float64)
    length = np.linalg.norm(tokens, axis=-1, keepdims=True)
    unit = tokens / np.where(length > 0, length, 1.0)
    return unit, length[..., 0] > 0, np.square(unit[:, 1:] - unit[:, :-1]).sum(axis=-1) / 2.0


def _sizes(
    x: np.ndarray,
    bits: np.ndarray,
    mean: np.ndarray,
    mean_bits: np.ndarray,
    norms: np.ndarray,
    magnitudes: np.ndarray,
    numbers: np.ndarray,
) -> None:
    """Fill the arrays for tokens ``x``; ``bits`` are its float32 as integers, and ``magnitudes`` those without a sign."""
    K, N, D = x.shape
    first = norms.shape[1] - N
    total = np.empty(D)
    for k in range(K):
        # In float64: of streams that nearly cancel, the rounding would be the mean.
        total[:] = 0.0
        for n in range(N):
            for d in range(D):
                total[d] += x[k, n, d]
        for d in range(D):
            mean[k, d] = total[d] / N
        for v in range(first + N):
            row = mean[k] if first and v == 0 else x[k, v - first]
            row_bits = mean_bits[k] if first and v == 0 else bits[k, v - first]
            of_view = magnitudes[v, k * D : (k + 1) * D]
            square, number = 0.0, 0
            for d in range(D):
                square += np.float64(row[d]) * np.float64(row[d])
            for d in range(D):
                of_view[d] = row_bits[d] & np.int32(MAGNITUDE)
                number += of_view[d] != 0
            norms[k, v] = np.sqrt(square)
            numbers[v] += number


def _near_median(magnitudes: np.ndarray, rank: int, near: np.ndarray, below: np.ndarray) -> None:
    """Fill ``near`` with the numbers that begin with the same bits as the one of a rank.

    ``below``: that rank among these, how many they are, and the largest number below them.
    """
    counts = np.zeros(1 << 13, np.int64)
    for magnitude in magnitudes:
        counts[magnitude >> 18] += 1  # numbers of one octave and its 32nd part
    first, before, smaller = 0, 0, 0
    while smaller + counts[first] <= rank:
        smaller += counts[first]
        before = first if counts[first] else before
        first += 1
    count, largest = 0, np.int32(0)
    for magnitude in magnitudes:
        if magnitude >> 18 == first:
            near[count] = magnitude
            count += 1
        elif magnitude >> 18 == before:
            largest = max(largest, magnitude)
    below[0], below[1], below[2] = rank - smaller, count, largest


def _units(x: np.ndarray, unit: np.ndarray, length: np.ndarray, turned: np.ndarray) -> None:
    L, K, D = x.shape
    for k in range(K):
        for depth in range(L):
            square = 0.0
            for d in range(D):
                square += np.float64(x[depth, k, d]) * np.float64(x[depth, k, d])
            length[k, depth] = np.sqrt(square)
            inverse = 1.0 / length[k, depth] if square > 0.0 else 0.0
            for d in range(D):
                unit[k, depth, d] = x[depth, k, d] * inverse
            if depth:
                square = 0.0
                for d in range(D):
                    difference = unit[k, depth, d] - unit[k, depth - 1, d]
                    square += difference * difference
                turned[k, depth - 1] = square / 2.0
