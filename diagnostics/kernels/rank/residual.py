"""How far are the rows from being all equal? Dong's relative residual of rank collapse.

Shapes: ``...`` batch, ``N`` rows (tokens), ``d`` columns (features).
"""

from typing import Any

from depthscope.diagnostics.kernels._arrays import Array, peak, ratio, rows


def dong_residual(x: Array, *, center: bool = False, mask: Array | None = None) -> Array:
    """Relative residual of rank collapse: √(‖R‖₁ ‖R‖_∞) / √(‖X‖₁ ‖X‖_∞) with R = X − 1x̄ᵀ.

    ‖·‖₁ is the largest column sum and ‖·‖_∞ the largest row sum of absolute values.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    center
        Remove the mean row from the denominator too; the value is then 1 unless all rows are equal.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...); 0 when all rows are equal, NaN for a zero matrix. Source: Dong et al. 2103.03404, who
        minimise over the common row where this subtracts the mean: an upper bound of theirs.

    Examples
    --------
    Rows 1 ± 1: the residual has sums 2 and 1, the matrix 2 and 2.

    >>> import numpy as np
    >>> round(float(dong_residual(np.array([[2.0], [0.0]]))) ** 2, 12)
    0.5
    """
    residual = rows(x, mask=mask, center=True)
    xp = residual.xp
    values = residual.values if center else rows(x, mask=mask).values
    scale = peak(xp, values)  # products of sums of huge or tiny entries would leave float64
    return ratio(xp, _path_norm(xp, residual.values / scale), _path_norm(xp, values / scale))


def _path_norm(xp: Any, x: Array) -> Array:
    """√(‖X‖₁ ‖X‖_∞), (...)."""
    size = xp.abs(x)
    columns = xp.max(xp.sum(size, axis=-2), axis=-1)
    return xp.sqrt(columns * xp.max(xp.sum(size, axis=-1), axis=-1))
