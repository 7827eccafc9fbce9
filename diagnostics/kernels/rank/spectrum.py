"""What are the singular values of a matrix? Fast where a Gram matrix is exact enough, by an SVD elsewhere.

Shapes: ``...`` batch, ``N`` rows (tokens), ``d`` columns (features), ``k = min(N, d)`` singular values s.
"""

from typing import Any

from array_api_compat import device

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array, Rows, as_float64, gram, peak, rows, scaled, triangle

# A float64 Gram matrix has eigenvalues to about 1e-16 λ_max. Below this λ_min/λ_max the small ones, and with them
# σ = √λ, have lost so many digits that the effective rank can move by 1e-7: decompose the matrix itself.
GRAM_LIMIT = 1e-11


def singular_values(x: Array, *, center: bool = False, mask: Array | None = None) -> Array:
    """Singular values in descending order.

    From the eigenvalues of the smaller Gram matrix in float64, and from an SVD of the matrix itself where
    λ_min/λ_max is so small that squaring the condition loses the small values. Values that are zero by
    construction (masked rows, the direction that centring removes) are exactly zero.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    center
        Remove the mean row first.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        Singular values (..., min(N, d)), float64, in the units of ``x``.

    Examples
    --------
    >>> import numpy as np
    >>> singular_values(np.array([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]])).round(12).tolist()
    [4.0, 3.0]
    """
    matrix = rows(x, mask=mask, center=center)
    xp, shape = matrix.xp, matrix.values.shape
    values, scale = scaled(matrix)
    flat = xp.reshape(values, (-1, *shape[-2:]))
    possible = xp.reshape(_is_possible(matrix, center), (-1, min(shape[-2:])))
    energy = _eigenvalues(xp, flat, possible)
    s = xp.sqrt(energy)
    smallest = xp.min(xp.where(possible, energy, xp.full_like(energy, xp.inf)), axis=-1)
    unreliable = (smallest < GRAM_LIMIT * energy[:, 0]) & (energy[:, 0] > 0)
    if bool(xp.any(unreliable)):
        s[unreliable] = _direct_singular_values(xp, flat[unreliable])
        s = xp.where(possible, s, xp.zeros_like(s))
    return xp.reshape(s, (*shape[:-2], -1)) * scale[..., 0]


def energies(x: Array, center: bool, mask: Array | None) -> tuple[Any, Array]:
    """The namespace, and squared singular values (..., k) up to a common factor, from the Gram matrix alone.

    For ranks that weight directions by their energy σ²: what a Gram matrix loses is below 1e-16 of the sum.
    """
    matrix = rows(x, mask=mask, center=center)
    return matrix.xp, _eigenvalues(matrix.xp, scaled(matrix)[0], _is_possible(matrix, center))


def _is_possible(matrix: Rows, center: bool) -> Array:
    """Booleans (..., k), False for singular values that are zero by the number of rows and columns.

    Rounding makes them 1e-8 σ₁, not zero, and an entropy of many such values is not small.
    """
    xp, (num_rows, num_columns) = matrix.xp, matrix.values.shape[-2:]
    # Centred rows add up to zero: one rank less.
    largest_rank = xp.clip(matrix.count - float(center), min=0.0, max=float(num_columns))
    index = xp.arange(min(num_rows, num_columns), device=device(matrix.values))
    return index < largest_rank[..., None]


def _eigenvalues(xp: Any, x: Array, possible: Array) -> Array:
    """Eigenvalues (..., k) of the smaller Gram matrix, descending, those that must be zero set to zero."""
    energy = xp.flip(xp.linalg.eigvalsh(gram(xp, x)), axis=-1)
    return xp.where(possible & (energy > 0), energy, xp.zeros_like(energy))


def _direct_singular_values(xp: Any, x: Array) -> Array:
    """Singular values without squaring: an SVD, after a QR decomposition where the matrix is long and narrow."""
    tall = xp.matrix_transpose(x) if x.shape[-2] < x.shape[-1] else x
    # R has the same singular values. LAPACK takes this path from a ratio of about 11/6 on; 1.5 is a heuristic of ours.
    if tall.shape[-2] > 1.5 * tall.shape[-1]:
        tall = triangle(xp, tall)
    return xp.linalg.svdvals(tall)


def as_spectrum(s: Array) -> tuple[Any, Array]:
    """The namespace, and singular values divided by the largest (squares cannot overflow); refused if negative."""
    xp, s = as_float64(s, name="s")
    if bool(xp.any(s < 0)):
        raise InputError(
            f"s has negative values (least {float(xp.min(s)):.3g}); expected singular values (..., k) ≥ 0"
        )
    return xp, s / peak(xp, s, axis=-1)
