"""Do the distances between rows agree? RBF CKA and RSA.

Shapes: ``...`` batch, ``N`` rows (the same tokens on both sides), ``d`` columns (features).
"""

from typing import Any

from array_api_compat import array_namespace, device

from depthscope.diagnostics.kernels._arrays import Array, first_equal, peak, rows, unit_rows
from depthscope.diagnostics.kernels.similarity.cka import cka_from_hsic, hsic1
from depthscope.diagnostics.kernels.similarity.pairwise import compare_sides

# Distances this near, as a share of themselves, are ties: rounding alone parts them.
TIE = 1e-12
# Only rows nearer than this share of their square can be equal: rounding does not reach so far.
NEAR = 1e-9


def square_distances(xp: Any, x: Array) -> Array:
    """Squared distances between rows (N, d); those of equal rows are equal to the last bit, and 0 among them.

    A product of matrices rounds equal rows differently by their place, and ranks would see it.
    """
    x = rows(x, center=True).values
    square, own = xp.linalg.vecdot(x, x), xp.arange(x.shape[0], device=device(x))
    apart = x @ x.T
    apart *= -2.0
    apart += square[:, None]
    apart += square
    apart[own, own] = xp.inf
    if bool(xp.any(xp.min(apart, axis=-1) <= NEAR * square)):
        apart = _equal_where_rows_are(xp, xp.clip(apart, min=0.0), first_equal(xp, x))
    apart[own, own] = 0.0
    return apart


def _equal_where_rows_are(xp: Any, apart: Array, same: Array) -> Array:
    """Distances made equal for equal rows, given for each row the first of those equal to it."""
    if bool(xp.all(same == xp.arange(same.shape[0], device=device(same)))):
        return apart
    apart = (0.5 * (apart + apart.T))[same][:, same]
    apart[same[:, None] == same[None, :]] = 0.0
    return apart


def _upper(xp: Any, square: Array) -> Array:
    """Entries above the diagonal of (n, n), flat."""
    return xp.concat([square[row, row + 1 :] for row in range(square.shape[0])])


def _median(xp: Any, values: Array) -> Array:
    """The median of flat values."""
    ordered, n = xp.sort(values), values.shape[0]
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2.0


def rbf_cka(
    x: Array,
    y: Array | None = None,
    *,
    fraction: float = 0.5,
    unbiased: bool = False,
    mask: Array | None = None,
) -> Array:
    """RBF CKA: the kernel exp(−‖x_i − x_j‖²/(2σ²)), σ a fraction of the median distance of each side.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows; without y all pairs of layers (L, N, d).
    fraction
        σ as a multiple of the median distance between different rows.
    unbiased
        Use Song's HSIC₁.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...) or (L, L); NaN where the median distance of a side is zero. Source: Kornblith et al. 1905.00414.

    Raises
    ------
    ValueError
        If ``fraction`` is not positive or rows do not match.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(20, 3))
    >>> round(float(rbf_cka(x, 5 * x[:, ::-1] + 1)), 12)  # isometries and scale change nothing
    1.0
    """
    if not fraction > 0:
        raise ValueError(f"fraction is {fraction}; expected a positive multiple of the median distance")

    hsic = hsic1 if unbiased else _product

    def prepare(xp: Any, side: Array) -> tuple[Array, Array]:
        if side.shape[0] < 2:
            return side, xp.asarray(xp.nan, dtype=xp.float64, device=device(side))
        kernel = _rbf(xp, side, fraction)
        kernel = kernel if unbiased else _centred(xp, kernel)
        return kernel, hsic(kernel, kernel)

    def combine(xp: Any, left: tuple[Array, Array], right: tuple[Array, Array]) -> Array:
        (k, own_k), (q, own_q) = left, right
        return own_k if k.shape[0] < 2 else cka_from_hsic(hsic(k, q), own_k, own_q)

    return compare_sides(prepare, combine, x, y, mask)


def _rbf(xp: Any, x: Array, fraction: float) -> Array:
    """The RBF kernel; all ones, and so without variance, where the median distance is zero."""
    square = square_distances(xp, x / peak(xp, x))
    width = fraction * _median(xp, xp.sqrt(_upper(xp, square)))
    safe = xp.where(width > 0, width, xp.ones_like(width))
    return xp.where(width > 0, xp.exp(-square / (2.0 * safe**2)), xp.ones_like(square))


def _centred(xp: Any, kernel: Array) -> Array:
    """A kernel less the means of its rows and columns."""
    return kernel - xp.mean(kernel, axis=-1, keepdims=True) - xp.mean(kernel, axis=-2) + xp.mean(kernel)


def _product(k: Array, q: Array) -> Array:
    """⟨K, L⟩ of kernels, which is the biased HSIC of centred ones."""
    return array_namespace(k).sum(k * q)


def rsa(
    x: Array,
    y: Array | None = None,
    *,
    metric: str = "correlation",
    compare: str = "spearman",
    mask: Array | None = None,
) -> Array:
    """RSA: correlation between the dissimilarities of all pairs of rows on the two sides.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows; without y all pairs of layers (L, N, d).
    metric
        ``"correlation"`` (1 − Pearson over features), ``"cosine"`` or ``"euclidean"``.
    compare
        ``"spearman"`` (ties get mean ranks) or ``"pearson"``.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...) or (L, L), between −1 and 1; NaN when all dissimilarities of a side are equal or a row has no
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

    def prepare(xp: Any, side: Array) -> Array:
        if side.shape[0] < 3:
            return xp.full((1,), xp.nan, dtype=xp.float64, device=device(side))
        found = _dissimilarities(xp, side, metric)
        return _standardised(xp, _ranks(xp, found) if compare == "spearman" else found)

    def combine(xp: Any, a: Array, b: Array) -> Array:
        return xp.linalg.vecdot(a, b)

    return compare_sides(prepare, combine, x, y, mask, center=False)


def _dissimilarities(xp: Any, x: Array, metric: str) -> Array:
    """Dissimilarities of all pairs of rows, flat; NaN where a row has no direction."""
    if metric == "euclidean":
        x = rows(x, center=True).values
        return xp.sqrt(_upper(xp, square_distances(xp, x / peak(xp, x))))
    if metric == "correlation":
        x = xp.matrix_transpose(rows(xp.matrix_transpose(x), center=True).values)
    unit, length = unit_rows(xp, x)
    found = 0.5 * _upper(xp, square_distances(xp, unit))  # 1 − cos, with its digits where all point one way
    return found if bool(xp.all(length > 0)) else xp.full_like(found, xp.nan)


def _ranks(xp: Any, values: Array) -> Array:
    """Ranks from 1, the mean rank for ties; NaN anywhere leaves NaN."""
    if bool(xp.isnan(xp.max(values))):
        return values
    order = xp.argsort(values, stable=False)
    ordered = values[order]
    ranks = xp.empty_like(values)
    ranks[order] = _ranks_in_order(xp, ordered, ordered[:-1] < (1.0 - TIE) * ordered[1:])
    return ranks


def _ranks_in_order(xp: Any, ordered: Array, grows: Array) -> Array:
    """Ranks of values in order, given where the next one is larger."""
    ranks = xp.arange(1, ordered.shape[0] + 1, dtype=xp.float64, device=device(ordered))
    if bool(xp.all(grows)):
        return ranks
    fresh = xp.concat([xp.ones_like(grows[:1]), grows])
    first = ranks[fresh]
    last = xp.concat([first[1:] - 1.0, ranks[-1:]])
    return ((first + last) / 2.0)[xp.cumulative_sum(xp.astype(fresh, xp.int64)) - 1]


def _standardised(xp: Any, values: Array) -> Array:
    """Flat values less their mean, at unit length, so that a product is Pearson's correlation; NaN if constant."""
    values = values - xp.mean(values)
    size = xp.linalg.vector_norm(values)
    return values / xp.where(size > 0, size, xp.nan)
