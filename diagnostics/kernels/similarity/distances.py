"""Do the distances between rows agree? RBF CKA and RSA.

Shapes: ``...`` batch, ``N`` rows (the same tokens on both sides), ``d`` columns (features).
"""

from typing import Any

from array_api_compat import array_namespace, device

from diagnostics.kernels._arrays import Array, first_equal, peak, ratio, rows, unit_rows
from diagnostics.kernels.similarity.cka import cka_from_hsic, hsic1
from diagnostics.kernels.similarity.pair import each

# Distances this near, as a share of themselves, are ties: rounding alone parts them.
TIE = 1e-12


def square_distances(xp: Any, x: Array) -> Array:
    """Squared distances between rows (N, d); those of equal rows are equal to the last bit, and 0 among them.

    A product of matrices rounds equal rows differently by their place, and ranks would see it.
    """
    x = rows(x, center=True).values
    square = xp.linalg.vecdot(x, x)
    apart = xp.clip(square[:, None] + square[None, :] - 2.0 * (x @ x.T), min=0.0)
    own, same = xp.arange(x.shape[0], device=device(x)), first_equal(xp, x)
    if bool(xp.any(same != own)):
        apart = (0.5 * (apart + apart.T))[same][:, same]
        apart[same[:, None] == same[None, :]] = 0.0
    apart[own, own] = 0.0
    return apart


def cosine_distances(xp: Any, x: Array) -> Array:
    """1 − cos of all pairs of rows as ½‖u − w‖², which keeps its digits where all rows point one way."""
    return 0.5 * square_distances(xp, unit_rows(xp, x)[0])


def _upper(xp: Any, square: Array) -> Array:
    """Entries above the diagonal of (n, n), flat."""
    n = square.shape[0]
    index = xp.arange(n, device=device(square))
    return square[index[:, None] < index[None, :]]


def _median(xp: Any, values: Array) -> Array:
    """The median of flat values."""
    ordered, n = xp.sort(values), values.shape[0]
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2.0


def rbf_cka(
    x: Array, y: Array, *, fraction: float = 0.5, unbiased: bool = False, mask: Array | None = None
) -> Array:
    """RBF CKA: the kernel exp(−‖x_i − x_j‖²/(2σ²)), σ a fraction of the median distance of each side.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows.
    fraction
        σ as a multiple of the median distance between different rows.
    unbiased
        Use Song's HSIC₁.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...); NaN where the median distance of a side is zero. Source: Kornblith et al. 1905.00414.

    Raises
    ------
    ValueError
        If ``fraction`` is not positive, rows do not match or hold NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(20, 3))
    >>> round(float(rbf_cka(x, 5 * x[:, ::-1] + 1)), 12)  # isometries and scale change nothing
    1.0
    """
    if not fraction > 0:
        raise ValueError(f"fraction is {fraction}; expected a positive multiple of the median distance")

    def of(xp: Any, left: Array, right: Array) -> Array:
        if left.shape[0] < 2:
            return xp.asarray(xp.nan, dtype=xp.float64, device=device(left))
        k, q = (_rbf(xp, side, fraction) for side in (left, right))
        hsic = hsic1 if unbiased else _biased_hsic
        return cka_from_hsic(hsic(k, q), hsic(k, k), hsic(q, q))

    return each(of, x, y, mask)


def _rbf(xp: Any, x: Array, fraction: float) -> Array:
    """The RBF kernel; all ones, and so without variance, where the median distance is zero."""
    square = square_distances(xp, x / peak(xp, x))
    width = fraction * _median(xp, xp.sqrt(_upper(xp, square)))
    safe = xp.where(width > 0, width, xp.ones_like(width))
    return xp.where(width > 0, xp.exp(-square / (2.0 * safe**2)), xp.ones_like(square))


def _biased_hsic(k: Array, q: Array) -> Array:
    """⟨K_c, L_c⟩ of doubly centred kernels."""
    xp = array_namespace(k)
    centered = [
        m - xp.mean(m, axis=-1, keepdims=True) - xp.mean(m, axis=-2, keepdims=True) + xp.mean(m)
        for m in (k, q)
    ]
    return xp.sum(centered[0] * centered[1])


def rsa(
    x: Array, y: Array, *, metric: str = "correlation", compare: str = "spearman", mask: Array | None = None
) -> Array:
    """RSA: correlation between the dissimilarities of all pairs of rows on the two sides.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows.
    metric
        ``"correlation"`` (1 − Pearson over features), ``"cosine"`` or ``"euclidean"``.
    compare
        ``"spearman"`` (ties get mean ranks) or ``"pearson"``.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), between −1 and 1; NaN when all dissimilarities of a side are equal or a row has no
        direction. Source: Kriegeskorte et al. 2008.

    Raises
    ------
    ValueError
        If ``metric`` or ``compare`` is unknown, or rows do not match.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[0.0], [1.0], [3.0]])
    >>> float(rsa(x, 2 * x, metric="euclidean").round(12))
    1.0
    """
    if metric not in ("correlation", "cosine", "euclidean") or compare not in ("spearman", "pearson"):
        raise ValueError(
            f"metric is {metric!r} and compare {compare!r}; expected 'correlation', 'cosine' or 'euclidean', "
            "and 'spearman' or 'pearson'"
        )

    def of(xp: Any, left: Array, right: Array) -> Array:
        if left.shape[0] < 3:
            return xp.asarray(xp.nan, dtype=xp.float64, device=device(left))
        a, b = (_dissimilarities(xp, side, metric) for side in (left, right))
        if compare == "spearman":
            a, b = _ranks(xp, a), _ranks(xp, b)
        return _pearson(xp, a, b)

    return each(of, x, y, mask, center=False)


def _dissimilarities(xp: Any, x: Array, metric: str) -> Array:
    """Dissimilarities of all pairs of rows, flat; NaN where a row has no direction."""
    if metric == "euclidean":
        x = rows(x, center=True).values
        return xp.sqrt(_upper(xp, square_distances(xp, x / peak(xp, x))))
    if metric == "correlation":
        x = xp.matrix_transpose(rows(xp.matrix_transpose(x), center=True).values)
    found = _upper(xp, cosine_distances(xp, x))
    return found if bool(xp.all(unit_rows(xp, x)[1] > 0)) else xp.full_like(found, xp.nan)


def _ranks(xp: Any, values: Array) -> Array:
    """Ranks from 1, the mean rank for ties; NaN anywhere leaves NaN."""
    if bool(xp.any(xp.isnan(values))):
        return values
    order = xp.argsort(values, stable=True)
    ordered = values[order]
    fresh = xp.concat([ordered[:1] == ordered[:1], ordered[1:] - ordered[:-1] > TIE * ordered[1:]])
    first = xp.astype(xp.nonzero(fresh)[0], xp.float64)
    end = xp.concat([first[1:], xp.full_like(first[:1], float(values.shape[0]))])
    ranks = xp.zeros_like(values)
    ranks[order] = ((first + end + 1.0) / 2.0)[xp.cumulative_sum(xp.astype(fresh, xp.int64)) - 1]
    return ranks


def _pearson(xp: Any, a: Array, b: Array) -> Array:
    """Pearson correlation of flat values, NaN where a side is constant."""
    a, b = a - xp.mean(a), b - xp.mean(b)
    return ratio(xp, xp.sum(a * b), xp.sqrt(xp.sum(a * a)) * xp.sqrt(xp.sum(b * b)))
