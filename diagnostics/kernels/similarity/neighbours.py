"""Do rows have the same neighbours? Mutual k-nearest neighbours and CKNNA.

Shapes: ``...`` batch, ``N`` rows (the same tokens on both sides), ``d`` columns (features).
"""

from typing import Any

from array_api_compat import device

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array, as_count, first_equal, rows, unit_rows
from depthscope.diagnostics.kernels.similarity.cka import cka_from_hsic, hsic1
from depthscope.diagnostics.kernels.similarity.pairwise import compare_sides

# Up to this k, finding the largest entry of each row k times is cheaper than sorting the row. A heuristic of ours.
PASSES = 50
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


def _neighbours(xp: Any, similarity: Array, k: int) -> Array:
    """Booleans (n, n): j is among the k most similar to i, never i itself; the first index wins ties."""
    n = similarity.shape[0]
    index = xp.arange(n, device=device(similarity))
    remaining = xp.asarray(similarity, copy=True)
    remaining[index, index] = -xp.inf
    if k > PASSES:
        chosen = xp.zeros((n, n), dtype=xp.bool, device=device(similarity))
        # Stable, and argmax below returns the first maximum: both paths choose the same of equal neighbours.
        chosen[index[:, None], xp.argsort(-remaining, axis=-1, stable=True)[:, :k]] = True
        return chosen
    for _ in range(k):
        remaining[index, xp.argmax(remaining, axis=-1)] = -xp.inf
    remaining[index, index] = 0.0  # the row itself is no neighbour
    return remaining == -xp.inf


def _require_neighbours(n: int, k: int, least: int) -> None:
    """Refuse more neighbours than there are."""
    if not least <= k < n:
        raise InputError(f"k is {k} for {n} rows; expected {least} ≤ k < {n}")


def mutual_knn(x: Array, y: Array | None = None, k: int = 10, *, mask: Array | None = None) -> Array:
    """Mutual k-nearest neighbours: mean share of each row's k nearest, by cosine, that both sides agree on.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows; without y all pairs of layers (L, N, d).
    k
        Number of neighbours, below N.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...) or (L, L), between 0 and 1; about k/(N − 1) for unrelated data. Source: Huh et al. 2405.07987.

    Raises
    ------
    InputError
        If ``k`` is not an integer between 1 and N − 1, or rows do not match.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> float(mutual_knn(x, x[:, ::-1], 1))
    1.0
    """
    k = as_count(k, name="k")

    def prepare(xp: Any, side: Array) -> Array:
        _require_neighbours(side.shape[0], k, 1)
        return _neighbours(xp, _cosines(xp, side), k)

    def combine(xp: Any, a: Array, b: Array) -> Array:
        return xp.sum(xp.astype(a & b, xp.float64)) / (a.shape[0] * k)

    return compare_sides(prepare, combine, x, y, mask, center=False)


def _cosines(xp: Any, x: Array) -> Array:
    """Cosines of all pairs of rows (n, n), 0 for zero rows; bitwise equal for equal rows."""
    # From distances, which are made equal for equal rows: products of rows are not, and neighbours would change.
    unit, length = unit_rows(xp, x)
    directed = length > 0
    cosines = 1.0 - 0.5 * square_distances(xp, unit)
    return xp.where(directed[:, None] & directed[None, :], cosines, xp.zeros_like(cosines))


def cknna(x: Array, y: Array | None = None, k: int = 10, *, mask: Array | None = None) -> Array:
    """CKNNA: unbiased CKA restricted to pairs that are k-nearest neighbours on both sides.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows, which are set to length 1; without y all
        pairs of layers (L, N, d).
    k
        Number of neighbours, at least 2 and below N.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...) or (L, L), 1 for x against itself; NaN where a denominator is not positive. Being a neighbour is not
        symmetric, so that swapping the sides changes the value a little: of two layers the earlier one is x.
        Source: Huh et al. 2405.07987.

    Raises
    ------
    InputError
        If ``k`` is not an integer between 2 and N − 1, or rows do not match.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(30, 3))
    >>> round(float(cknna(x, 2 * x, 5)), 12)
    1.0
    """
    k = as_count(k, name="k")

    def prepare(xp: Any, side: Array) -> tuple[Array, Array, Array]:
        _require_neighbours(side.shape[0], k, 2)
        cosines = _cosines(xp, side)
        near = xp.astype(_neighbours(xp, cosines, k), xp.float64)
        kernel = near * cosines
        return near, kernel, hsic1(kernel, kernel)

    def combine(xp: Any, left: tuple[Array, ...], right: tuple[Array, ...]) -> Array:
        (near_a, a, own_a), (near_b, b, own_b) = left, right
        # Pairs that are neighbours on both sides; each kernel is already zero outside its own neighbourhood.
        return cka_from_hsic(hsic1(near_b * a, near_a * b), own_a, own_b)

    return compare_sides(prepare, combine, x, y, mask, center=False)
