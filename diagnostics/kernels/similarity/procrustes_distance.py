"""How different are two shapes after the best rotation? The Procrustes distance.

Shapes: ``...`` batch, ``N`` rows (the same tokens on both sides), ``d`` columns (features).
"""

from typing import Any

from array_api_compat import device

from depthscope.diagnostics.kernels._arrays import Array, peak, triangle
from depthscope.diagnostics.kernels.similarity.pairwise import compare_sides

# Squared distances 2 − 2 Σ σ_i above this have lost two of sixteen digits at most; nearer shapes need their residual.
FAR = 1e-2


def procrustes(
    x: Array, y: Array | None = None, *, squared: bool = False, mask: Array | None = None
) -> Array:
    """Procrustes shape distance: the angle arccos ‖XᵀY‖_* of centred sides at ‖·‖_F = 1.

    Computed from the residual of the best rotation, 2 arcsin(‖X − YQ‖_F/2), accurate down to angles of 1e-15 (the
    arccos is not below 1e-8).

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows, the narrower one as if with zero columns;
        without y all pairs of layers (L, N, d).
    squared
        Give the squared Euclidean distance min_Q ‖X − YQ‖_F² = 2 − 2 cos instead of the angle.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...) or (L, L), angle in radians between 0 and π/2, or its square form between 0 and 2; NaN for a side
        without variance. Source: Williams et al. 2110.14739 (netrep).

    Raises
    ------
    ValueError
        If rows do not match.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    >>> y = np.array([[1.0, 0.0], [1.0, 0.0], [-2.0, 0.0]])
    >>> round(float(procrustes(x, y)), 9) == round(np.pi / 2, 9)
    True
    """

    def combine(xp: Any, left: Array, right: Array) -> Array:
        residual = _rotation_residual(xp, left, right)
        return residual**2 if squared else 2.0 * xp.asin(xp.clip(residual / 2.0, max=1.0))

    return compare_sides(_shape, combine, x, y, mask)


def _shape(xp: Any, x: Array) -> Array:
    """The shape at unit norm, rotated to at most N columns; NaN without variance."""
    if x.shape[0] == 0:
        return xp.full((1, 1), xp.nan, dtype=xp.float64, device=device(x))
    x = x / peak(xp, x)
    # LQ: N rows span N directions at most, and a rotation changes no distance between shapes.
    if x.shape[0] < x.shape[1]:
        x = triangle(xp, x.T).T
    size = xp.linalg.vector_norm(x)
    return x / xp.where(size > 0, size, xp.nan)


def _rotation_residual(xp: Any, a: Array, b: Array) -> Array:
    """min_Q ‖A − BQ‖_F of centred matrices at unit norm, NaN where one is."""
    # The narrower shape is rotated into the columns of the wider one.
    if a.shape[1] < b.shape[1]:
        a, b = b, a
    shared = b.T @ a
    if bool(xp.any(xp.isnan(shared))):  # LAPACK refuses NaN
        return xp.sum(shared)
    far = 2.0 - 2.0 * xp.sum(xp.linalg.svdvals(shared))
    if bool(far > FAR):
        return xp.sqrt(far)
    u, _, vt = xp.linalg.svd(shared, full_matrices=False)
    return xp.linalg.vector_norm(a - b @ (u @ vt))
