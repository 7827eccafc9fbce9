"""How similar are two linear kernels? CKA, its two HSIC estimators, and what unrelated data would give.

Shapes: ``...`` batch, ``N`` rows (the same tokens on both sides), ``d`` columns (features).
"""

from typing import Any

from array_api_compat import array_namespace

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array, Rows, as_array, of_one_library, rows, scaled


def _inner(xp: Any, x: Array, y: Array) -> Array:
    """⟨XXᵀ, YYᵀ⟩ by the cheaper of the Gram matrices and the cross-covariance, (...)."""
    # tr(XXᵀYYᵀ) = ‖XᵀY‖²: N² (d_x + d_y) multiplications by Gram matrices, N d_x d_y by the cross-covariance.
    n, dx, dy = x.shape[-2], x.shape[-1], y.shape[-1]
    xt, yt = xp.matrix_transpose(x), xp.matrix_transpose(y)
    if n * (dx + dy) < dx * dy:
        return xp.sum((x @ xt) * (y @ yt), axis=(-2, -1))
    return xp.sum((xt @ y) ** 2, axis=(-2, -1))


def _unbiased(xp: Any, inner: Array, k: Array, q: Array, n: Array) -> Array:
    """HSIC₁ of centred features from ⟨K, L⟩, the diagonals k and q (..., N) and the number of rows.

    With K1 = 0 Song's three terms are ⟨K, L⟩ − n/(n−2) Σ k_i q_i + tr K tr L /((n−1)(n−2)), over n(n−3).
    """
    enough = n > 3
    # The divisors of too few rows are zero: compute with 4 rows there, and return NaN.
    n = xp.where(enough, n, 4.0 * xp.ones_like(n))
    traces = xp.sum(k, axis=-1) * xp.sum(q, axis=-1)
    total = inner - n / (n - 2.0) * xp.sum(k * q, axis=-1) + traces / ((n - 1.0) * (n - 2.0))
    return xp.where(enough, total / (n * (n - 3.0)), xp.full_like(total, xp.nan))


def linear_hsic(a: Rows, b: Rows, unbiased: bool) -> Array:
    """HSIC of centred features, (...); the biased one without its divisor (N − 1)², which CKA divides out."""
    xp = a.xp
    inner = _inner(xp, a.values, b.values)
    if not unbiased:
        return inner
    return _unbiased(
        xp, inner, xp.linalg.vecdot(a.values, a.values), xp.linalg.vecdot(b.values, b.values), a.count
    )


def cka_from_hsic(xy: Array, xx: Array, yy: Array) -> Array:
    """CKA from HSIC terms: HSIC(x, y) / √(HSIC(x, x) HSIC(y, y)), not clipped, without an epsilon.

    Parameters
    ----------
    xy, xx, yy
        HSIC values of any one estimator, broadcastable.

    Returns
    -------
    Array
        The ratio; NaN where a denominator is not positive.

    Raises
    ------
    InputError
        If ``xy`` is infinite.

    Examples
    --------
    >>> float(cka_from_hsic(1.0, 4.0, 1.0))
    0.5
    """
    xy, xx, yy = as_array(xy), as_array(xx), as_array(yy)
    xp = array_namespace(xy)
    defined = (xx > 0) & (yy > 0)
    # Two roots, for the product of two squares can overflow where the norms do not.
    norm = xp.sqrt(xp.where(xx > 0, xx, xp.ones_like(xx))) * xp.sqrt(xp.where(yy > 0, yy, xp.ones_like(yy)))
    if bool(xp.any(xp.isinf(xy))):
        raise InputError("xy contains infinite HSIC values; expected finite ones: rescale the features")
    return xp.where(defined, xy / norm, xp.full_like(xy / norm, xp.nan))


def linear_cka(x: Array, y: Array, *, unbiased: bool = False, mask: Array | None = None) -> Array:
    """Linear CKA: ‖YᵀX‖_F² / (‖XᵀX‖_F ‖YᵀY‖_F) of centred features, or the same ratio of unbiased HSIC₁.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows.
    unbiased
        Use Song's HSIC₁: about 0 for unrelated data where the biased value is ``cka_null``; may be negative.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...); biased values lie in [0, 1]. NaN where a side has no variance (all rows equal) or, unbiased,
        fewer than 4 rows. Source: Kornblith et al. 1905.00414; Song et al. 2012.

    Raises
    ------
    InputError
        If rows do not match.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> float(linear_cka(x, x[:, :1]).round(12)) == round(0.5**0.5, 12)
    True
    """
    x, y = of_one_library(x, y)
    a = rows(x, mask=mask, center=True)
    b = rows(y, mask=mask, center=True, name="y")
    if a.values.shape[:-1] != b.values.shape[:-1]:
        raise InputError(
            f"x and y have shapes {tuple(a.values.shape)} and {tuple(b.values.shape)}; expected equal "
            "batch and rows (..., N); widths may differ"
        )
    # The ratio has no units: the scales, taken out against overflow, need not come back.
    a, b = a._replace(values=scaled(a)[0]), b._replace(values=scaled(b)[0])
    return cka_from_hsic(
        linear_hsic(a, b, unbiased), linear_hsic(a, a, unbiased), linear_hsic(b, b, unbiased)
    )


def cka_null(n: int, d_x: int, d_y: int | None = None) -> float:
    """Null expectation of biased CKA: √(d_x d_y / ((n + d_x)(n + d_y))) for independent Gaussian data.

    Parameters
    ----------
    n
        Rows.
    d_x, d_y
        Widths; equal when only one is given.

    Returns
    -------
    float
        The ratio of expectations, n counting before centring; unbiased CKA has 0.

    Raises
    ------
    InputError
        If a size is below 1.

    Examples
    --------
    >>> round(cka_null(100, 1000), 3)
    0.909
    """
    d_y = d_x if d_y is None else d_y
    if min(n, d_x, d_y) < 1:
        raise InputError(f"n, d_x, d_y is {n}, {d_x}, {d_y}; expected at least 1 each")
    # For n rows less their mean, W = XXᵀ has n − 1 degrees of freedom: E tr(W²) = (n−1) d (n + d), and independent
    # sides have E⟨K, L⟩ = (n−1) d_x d_y.
    return float((d_x * d_y / ((n + d_x) * (n + d_y))) ** 0.5)
