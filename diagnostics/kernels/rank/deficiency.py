"""How near is a matrix to a lower rank? Numerical rank and condition number.

Shapes: ``...`` batch, ``N`` rows (tokens), ``d`` columns (features), ``k = min(N, d)`` singular values s.
"""

import numpy as np
from array_api_compat import array_namespace

from depthscope.diagnostics.kernels._arrays import Array, as_array
from depthscope.diagnostics.kernels.rank.spectrum import as_spectrum, singular_values


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
