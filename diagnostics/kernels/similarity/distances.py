"""Do the distances between rows agree? RBF CKA and RSA.

Shapes: ``...`` batch, ``N`` rows (the same tokens on both sides), ``d`` columns (features).
"""

from typing import Any

from array_api_compat import array_namespace, device

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array, first_equal, peak, rows, unit_rows
from depthscope.diagnostics.kernels.similarity.cka import cka_from_hsic, hsic1
from depthscope.diagnostics.kernels.similarity.pairwise import compare_sides

# Distances that differ by less than this share are ties of the ranks: rounding alone, some 1e-14, makes them differ.
TIE = 1e-12
# Equal rows have computed squared distances of some 1e-15 ‖x‖², far below this share: above it a search for equal rows
# is not needed.
NEAR = 1e-9


def square_distances(xp: Any, x: Array) -> Array:
    """Squared distances (N, N) between rows (N, d): 0 between equal rows, whose other distances are bitwise equal.

    A matrix product rounds equal rows differently, depending on their position in its blocks, and ranks of distances
    would depend on it.
    """
    # ‖x − y‖² = ‖x‖² − 2⟨x, y⟩ + ‖y‖², in place: one (N, N) array. Centred first, against cancellation at an offset.
    x = rows(x, center=True).values
    square, diagonal = xp.linalg.vecdot(x, x), xp.arange(x.shape[0], device=device(x))
    distances = x @ x.T
    distances *= -2.0
    distances += square[:, None]
    distances += square
    distances[diagonal, diagonal] = xp.inf
    if bool(xp.any(xp.min(distances, axis=-1) <= NEAR * square)):
        distances = _equalised(xp, xp.clip(distances, min=0.0), first_equal(xp, x))
    distances[diagonal, diagonal] = 0.0
    return distances


def _equalised(xp: Any, distances: Array, first: Array) -> Array:
    """Distances in which equal rows have those of the first row equal to them; ``first`` is its index, (N,)."""
    if bool(xp.all(first == xp.arange(first.shape[0], device=device(first)))):
        return distances
    distances = (0.5 * (distances + distances.T))[first][:, first]
    distances[first[:, None] == first[None, :]] = 0.0
    return distances


def _upper(xp: Any, square: Array) -> Array:
    """Entries above the diagonal of (n, n), flat."""
    return xp.concat([square[row, row + 1 :] for row in range(square.shape[0])])


def _median(xp: Any, values: Array) -> Array:
    """The median of flat values; torch's own is the lower of two middle values."""
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
    InputError
        If ``fraction`` is not positive or rows do not match.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(20, 3))
    >>> round(float(rbf_cka(x, 5 * x[:, ::-1] + 1)), 12)  # isometries and scale change nothing
    1.0
    """
    if not fraction > 0:
        raise InputError(f"fraction is {fraction}; expected a positive multiple of the median distance")

    # ⟨K, L⟩ of kernels is the biased HSIC of centred ones.
    hsic = hsic1 if unbiased else lambda k, q: array_namespace(k).sum(k * q)

    def prepare(xp: Any, side: Array) -> tuple[Array, Array]:
        if side.shape[0] < 2:  # no distance, no median
            return side, xp.asarray(xp.nan, dtype=xp.float64, device=device(side))
        kernel = _rbf(xp, side, fraction)
        if not unbiased:  # less the means of its rows and columns
            kernel = (
                kernel - xp.mean(kernel, axis=-1, keepdims=True) - xp.mean(kernel, axis=-2) + xp.mean(kernel)
            )
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
    InputError
        If ``metric`` or ``compare`` is unknown, or rows do not match.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[0.0], [1.0], [3.0]])
    >>> float(rsa(x, 2 * x, metric="euclidean").round(12))
    1.0
    """
    if metric not in ("correlation", "cosine", "euclidean") or compare not in ("spearman", "pearson"):
        raise InputError(
            f"metric is {metric!r} and compare {compare!r}; expected 'correlation', 'cosine' or 'euclidean', "
            "and 'spearman' or 'pearson'"
        )

    def prepare(xp: Any, side: Array) -> Array:
        if side.shape[0] < 3:  # one distance has no correlation
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
    if metric == "correlation":  # the cosine of rows less their means
        x = xp.matrix_transpose(rows(xp.matrix_transpose(x), center=True).values)
    unit, length = unit_rows(xp, x)
    # 1 − cos θ = ‖u − w‖²/2 of unit rows: 1 − ⟨u, w⟩ would lose all digits where rows point in nearly one direction.
    found = 0.5 * _upper(xp, square_distances(xp, unit))
    return found if bool(xp.all(length > 0)) else xp.full_like(found, xp.nan)


def _ranks(xp: Any, values: Array) -> Array:
    """Ranks from 1, the mean rank for ties; NaN where any value is."""
    if bool(xp.isnan(xp.max(values))):
        return values
    # Not stable: the order of ties does not matter, and a stable sort of N²/2 distances takes longer.
    order = xp.argsort(values, stable=False)
    ordered = values[order]
    ranks = xp.empty_like(values)
    ranks[order] = _ranks_in_order(xp, ordered, ordered[:-1] < (1.0 - TIE) * ordered[1:])
    return ranks


def _ranks_in_order(xp: Any, ordered: Array, grows: Array) -> Array:
    """Ranks of ascending values, the mean rank for ties, given where the next value is larger (count − 1,)."""
    ranks = xp.arange(1, ordered.shape[0] + 1, dtype=xp.float64, device=device(ordered))
    if bool(xp.all(grows)):
        return ranks
    starts_tie = xp.concat([xp.ones_like(grows[:1]), grows])
    first = ranks[starts_tie]
    last = xp.concat([first[1:] - 1.0, ranks[-1:]])
    return ((first + last) / 2.0)[xp.cumulative_sum(xp.astype(starts_tie, xp.int64)) - 1]


def _standardised(xp: Any, values: Array) -> Array:
    """Flat values less their mean, at unit length, so that a product is Pearson's correlation; NaN if constant."""
    values = values - xp.mean(values)
    size = xp.linalg.vector_norm(values)
    return values / xp.where(size > 0, size, xp.nan)
