"""How much does a mixing matrix amplify or attenuate? Signed sums as in the plots of mHC, and operator norms."""

import math
from typing import NamedTuple

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array
from depthscope.diagnostics.kernels.mixing._matrices import log, square
from depthscope.diagnostics.kernels.mixing.spectra import singular_values


def forward_gain(p: Array) -> Array:
    """Amax gain forward: max_i |Σ_j P_ij|, the largest signed row sum.

    Parameters
    ----------
    p
        Mixing matrices or composites (..., n, n), rows are destinations.

    Returns
    -------
    Array
        (...); 1 for a row-stochastic matrix. Source: mHC 2512.24880, Fig. 3.

    Examples
    --------
    >>> float(forward_gain([[1.0, 2.0], [3.0, -3.0]]))
    3.0
    """
    xp, p = square(p)
    return xp.max(xp.abs(xp.sum(p, axis=-1)), axis=-1)


def backward_gain(p: Array) -> Array:
    """Amax gain backward: max_j |Σ_i P_ij|, the largest signed column sum.

    Parameters
    ----------
    p
        Mixing matrices or composites (..., n, n), rows are destinations.

    Returns
    -------
    Array
        (...); 1 for a column-stochastic matrix. Source: mHC 2512.24880, Fig. 3.

    Examples
    --------
    >>> float(backward_gain([[1.0, 2.0], [3.0, -3.0]]))
    4.0
    """
    xp, p = square(p)
    return xp.max(xp.abs(xp.sum(p, axis=-2)), axis=-1)


def log_forward_gain(p: Array, log_scale: Array | float = 0.0) -> Array:
    """Logarithm of the forward Amax gain of p · e^log_scale, finite where the gain itself would overflow.

    Parameters
    ----------
    p
        Matrices (..., n, n).
    log_scale
        (...), as the composites return it.

    Returns
    -------
    Array
        (...), natural logarithm; −inf for zero sums.

    Examples
    --------
    >>> float(log_forward_gain([[1.0, 0.0], [0.0, 1.0]], 5000.0))
    5000.0
    """
    xp, p = square(p)
    return log(xp, forward_gain(p)) + log_scale


def log_backward_gain(p: Array, log_scale: Array | float = 0.0) -> Array:
    """Logarithm of the backward Amax gain of p · e^log_scale, finite where the gain itself would overflow.

    Parameters
    ----------
    p
        Matrices (..., n, n).
    log_scale
        (...), as the composites return it.

    Returns
    -------
    Array
        (...), natural logarithm; −inf for zero sums.

    Examples
    --------
    >>> float(log_backward_gain([[1.0, 0.0], [0.0, 1.0]], -2000.0))
    -2000.0
    """
    xp, p = square(p)
    return log(xp, backward_gain(p)) + log_scale


def operator_gain(p: Array, order: float = math.inf) -> Array:
    """Operator norm ‖P‖_∞ (rows), ‖P‖₁ (columns) or ‖P‖₂: what signed sums can hide by cancellation.

    Parameters
    ----------
    p
        Matrices (..., n, n).
    order
        ``math.inf``, 1 or 2.

    Returns
    -------
    Array
        (...).

    Raises
    ------
    InputError
        If ``order`` is another.

    Examples
    --------
    >>> float(operator_gain([[1.0, 2.0], [3.0, -3.0]]))
    6.0
    """
    xp, p = square(p)
    if order == 2:
        return singular_values(p)[..., 0]
    if order not in (1, math.inf):
        raise InputError(f"order is {order!r}; expected 1, 2 or math.inf")
    return xp.max(xp.sum(xp.abs(p), axis=-2 if order == 1 else -1), axis=-1)


class Attenuation(NamedTuple):
    """The weakest sums of a matrix, which the largest hide."""

    row: Array  # (...), min_i |Σ_j P_ij|: forward
    column: Array  # (...), min_j |Σ_i P_ij|: backward


def attenuation(p: Array) -> Attenuation:
    """Attenuation: the smallest signed sums of rows and of columns.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Attenuation
        row and column, (...) each.

    Examples
    --------
    >>> found = attenuation([[0.5, 0.0], [0.0, 1.0]])
    >>> float(found.row), float(found.column)
    (0.5, 0.5)
    """
    xp, p = square(p)
    out, into = xp.abs(xp.sum(p, axis=-1)), xp.abs(xp.sum(p, axis=-2))
    return Attenuation(xp.min(out, axis=-1), xp.min(into, axis=-1))
