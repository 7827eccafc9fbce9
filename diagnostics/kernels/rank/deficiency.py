"""How near is a matrix to a lower rank, and what leads it? Numerical rank, leading directions, residuals.

Shapes: ``...`` batch, ``N`` rows (tokens), ``d`` columns (features), ``k = min(N, d)`` singular values s.
"""

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from depthscope.diagnostics.kernels._arrays import Array, as_array, peak, ratio, rows
from depthscope.diagnostics.kernels.rank.spectrum import as_spectrum, energies, singular_values


def numerical_rank_of(s: Array, *, rtol: float | Array = 1e-6) -> Array:
    """Numerical rank of singular values: how many exceed rtol · max σ.

    Parameters
    ----------
    s
        Singular values (..., k), in any order, zeros allowed.
    rtol
        Threshold as a share of the largest; an array (..., 1) gives each spectrum its own.

    Returns
    -------
    Array
        (...), integers as float64 between 0 and k; 0, not NaN, where all are zero.

    Examples
    --------
    >>> float(numerical_rank_of([1.0, 1e-3, 1e-9, 0.0]))
    2.0
    """
    xp, s = as_spectrum(s)
    return xp.sum(xp.astype((s > rtol) & (s > 0), xp.float64), axis=-1)


def numerical_rank(
    x: Array, *, center: bool = False, mask: Array | None = None, rtol: float | None = None
) -> Array:
    """Numerical rank: how many singular values exceed rtol · max σ.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    center
        Remove the mean row first.
    mask
        Booleans (..., N), False for rows that do not count.
    rtol
        Threshold as a share of the largest; by default max(N, d) times the precision of ``x``'s dtype.

    Returns
    -------
    Array
        (...), integers as float64 between 0 and min(N, d); 0 for a zero matrix.

    Examples
    --------
    >>> import numpy as np
    >>> float(numerical_rank(np.ones((3, 4))))
    1.0
    """
    # The default is that of numpy.linalg.matrix_rank: what rounding of the input itself can leave.
    s = singular_values(x, center=center, mask=mask)
    if rtol is None:
        rtol = _precision(x) * max(as_array(x).shape[-2:])
    return numerical_rank_of(s, rtol=rtol)


def _precision(x: Array) -> float:
    """Machine epsilon of the dtype of ``x`` (2⁻⁷ for bfloat16); that of float64 for integers."""
    x = as_array(x)
    xp, dtype = array_namespace(x), x.dtype
    return float(xp.finfo(dtype).eps) if xp.isdtype(dtype, "real floating") else float(np.finfo(float).eps)


def stable_rank_of(s: Array) -> Array:
    """Stable rank of singular values: Σσ² / max σ².

    Parameters
    ----------
    s
        Singular values (..., k), in any order, zeros allowed.

    Returns
    -------
    Array
        (...), between 1 and k; NaN where all are zero.

    Examples
    --------
    >>> float(stable_rank_of([2.0, 1.0]))
    1.25
    """
    xp, s = as_spectrum(s)
    return ratio(xp, xp.sum(s * s, axis=-1), xp.max(s, axis=-1) ** 2)


def stable_rank(x: Array, *, center: bool = False, mask: Array | None = None) -> Array:
    """Stable rank Σλ / λ_max = ‖X‖_F² / ‖X‖₂².

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
        (...), between 1 and min(N, d); NaN for a zero matrix.

    Examples
    --------
    >>> import numpy as np
    >>> float(stable_rank(np.diag([2.0, 1.0])))
    1.25
    """
    xp, energy = energies(x, center, mask)
    return ratio(xp, xp.sum(energy, axis=-1), energy[..., 0])


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
