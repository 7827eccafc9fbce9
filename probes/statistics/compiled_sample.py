"""In which direction does each sampled token point, and how far does a depth turn it? In one compiled pass.

By numba, where it is installed; numpy gives the same numbers elsewhere.
Shapes: L depth, K token, D feature.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np


@cache
def _compiled_units() -> Callable[..., Any] | None:
    """The compiled function; None where numba is not installed, or fails to compile on this machine."""
    try:
        import numba

        compiled = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})(_units)
        # Compiled now, for the types that come later.
        compiled(np.ones((2, 1, 4), np.float32), np.empty((1, 2, 4)), np.empty((1, 2)), np.empty((1, 1)))
    except Exception:  # numba missing, too old for this Python, or without a folder to write to
        return None
    return compiled


def unit_tokens(states_LKD: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directions of tokens at every depth, and how far each depth turns them.

    Parameters
    ----------
    states_LKD : ndarray
        float32, finite.

    Returns
    -------
    tuple of ndarray
        Unit vectors (K, L, D) in float64, zero where the state is; whether a token has a direction, (K, L); and 1 − cos
        between successive depths, (K, L − 1), by the difference of unit vectors, which does not cancel for blocks that turn
        states by little.
    """
    L, K, D = states_LKD.shape
    compiled = _compiled_units()
    if compiled is not None:
        unit, length = np.empty((K, L, D)), np.empty((K, L))
        turned = np.empty((K, L - 1))
        compiled(np.ascontiguousarray(states_LKD), unit, length, turned)
        return unit, length > 0, turned
    tokens = states_LKD.swapaxes(0, 1).astype(np.float64)
    length = np.linalg.norm(tokens, axis=-1, keepdims=True)
    unit = tokens / np.where(length > 0, length, 1.0)
    return unit, length[..., 0] > 0, np.square(unit[:, 1:] - unit[:, :-1]).sum(axis=-1) / 2.0


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
