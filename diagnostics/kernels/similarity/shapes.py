"""How far apart are two shapes, turned onto each other? The Procrustes distance.

Shapes: ``...`` batch, ``N`` rows (the same tokens on both sides), ``d`` columns (features).
"""

from typing import Any

import numpy as np
from array_api_compat import device

from diagnostics.kernels._arrays import Array, peak
from diagnostics.kernels.similarity.pair import each

# Above this squared distance between shapes of unit size the singular values alone give twelve digits.
FAR = 1e-2


def procrustes(x: Array, y: Array, *, squared: bool = False, mask: Array | None = None) -> Array:
    """Procrustes shape distance: the angle arccos ‖XᵀY‖_* of centred sides at ‖·‖_F = 1.

    Computed from the residual of the best rotation, 2 arcsin(‖X − YQ‖_F/2), right down to 1e-15.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows; the narrower one gains zero columns.
    squared
        Give the squared Euclidean distance min_Q ‖X − YQ‖_F² = 2 − 2 cos instead of the angle.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), angle in radians between 0 and π/2, or its square form between 0 and 2; NaN for a side
        without variance. Source: Williams et al. 2110.14739 (netrep).

    Raises
    ------
    ValueError
        If rows do not match or hold NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    >>> y = np.array([[1.0, 0.0], [1.0, 0.0], [-2.0, 0.0]])
    >>> round(float(procrustes(x, y)), 9) == round(np.pi / 2, 9)
    True
    """

    def of(xp: Any, left: Array, right: Array) -> Array:
        if left.shape[0] == 0:
            return xp.asarray(xp.nan, dtype=xp.float64, device=device(left))
        residual = _rotation_residual(xp, left, right)
        return residual**2 if squared else 2.0 * xp.asin(xp.clip(residual / 2.0, max=1.0))

    return each(of, x, y, mask)


def _rotation_residual(xp: Any, x: Array, y: Array) -> Array:
    """min_Q ‖X − YQ‖_F of centred matrices at unit norm, NaN where one is zero."""
    a, b = (_compact(xp, side, max(x.shape[1], y.shape[1])) for side in (x, y))
    size_a, size_b = xp.linalg.vector_norm(a), xp.linalg.vector_norm(b)
    if bool((size_a == 0) | (size_b == 0)):
        return size_a * xp.nan
    a, b = a / size_a, b / size_b
    shared = b.T @ a
    far = 2.0 - 2.0 * xp.sum(xp.linalg.svdvals(shared))
    if bool(far > FAR):
        return xp.sqrt(far)
    u, _, vt = xp.linalg.svd(shared, full_matrices=False)
    return xp.linalg.vector_norm(a - b @ (u @ vt))


def _compact(xp: Any, x: Array, width: int) -> Array:
    """The same shape in as few columns as two sides need: rotated to min(N, width) ones, zeros added."""
    x = x / peak(xp, x)
    if x.shape[0] < x.shape[1]:
        x = _triangle(xp, x.T).T
    missing = min(x.shape[0], width) - x.shape[1]
    if missing <= 0:
        return x
    return xp.concat([x, xp.zeros((x.shape[0], missing), dtype=xp.float64, device=device(x))], axis=1)


def _triangle(xp: Any, tall: Array) -> Array:
    """R of the QR decomposition, for a third of the price of both."""
    if isinstance(tall, np.ndarray):
        return np.linalg.qr(tall, mode="r")
    return xp.linalg.qr(tall, mode="r")[1]
