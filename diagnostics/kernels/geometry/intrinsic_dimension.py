"""How many dimensions does the cloud of tokens have? The TwoNN estimator.

Shapes: ``...`` batch, ``N`` rows (tokens), ``d`` columns (features).
"""

from typing import Any

from array_api_compat import device

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array, as_float64, ratio, row_hash, rows, scaled, selected

# Entries of one block of rows of the distance matrix: 32 MB of float64, so that N² distances are never in memory.
BLOCK = 4_000_000
# A squared distance ‖x‖² − 2⟨x, y⟩ + ‖y‖² has an error of some 1e-16 ‖x‖². Below this share of ‖x‖² it has lost three of
# its digits, and is computed from the difference of the rows instead.
NEAR = 1e-3


def two_nn(x: Array, *, discard: float = 0.1, mask: Array | None = None) -> Array:
    """Intrinsic dimension from two nearest neighbours: −ln(1 − F(μ)) = d ln μ with μ = r₂/r₁.

    The line through the origin is fitted over all but the largest share ``discard`` of the ratios.
    Duplicates count once: repeated tokens would give r₁ = 0 and, to others, μ = 1.

    Parameters
    ----------
    x
        Matrices (..., N, d); every matrix of the batch costs N² d.
    discard
        Share of the largest ratios that is left out, at least 0 and below 1.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...); NaN with fewer than three distinct rows or two ratios to fit. Source: Facco et al. 2017.

    Raises
    ------
    InputError
        If ``discard`` is out of range.

    Examples
    --------
    Points on a line, even gaps doubling: μ is the same for most, d is small and finite.

    >>> import numpy as np
    >>> bool(0.5 < two_nn(np.random.default_rng(0).random((200, 1)) @ np.ones((1, 5))) < 1.5)
    True
    """
    if not 0 <= discard < 1:
        raise InputError(f"discard is {discard}; expected a share from 0 up to but not including 1")
    matrix = rows(x, mask=mask, center=True)
    xp = matrix.xp
    matrix = matrix._replace(values=scaled(matrix)[0])
    each = [_two_nn(xp, points, discard) for points in selected(matrix)]
    return xp.reshape(xp.stack(each), matrix.values.shape[:-2])


def _two_nn(xp: Any, points: Array, discard: float) -> Array:
    """TwoNN of one cloud of points (N, d)."""
    points = _distinct(xp, points)
    if points.shape[0] < 3:
        return xp.asarray(xp.nan, dtype=xp.float64, device=device(points))
    return two_nn_of(*_nearest_two(xp, points), discard=discard)


def two_nn_of(nearest: Array, second: Array, *, discard: float = 0.1) -> Array:
    """Intrinsic dimension from the distances of every point to its two nearest neighbours; see `two_nn`.

    Parameters
    ----------
    nearest, second
        Distances (..., N), positive.
    discard
        Share of the largest ratios that is left out.

    Returns
    -------
    Array
        (...); NaN with fewer than two ratios to fit. Source: Facco et al. 2017.

    Examples
    --------
    Ratios of a uniform cloud in one dimension, whose distribution is 1 − 1/μ.

    >>> import numpy as np
    >>> ratios = 1 / (1 - np.arange(1, 100) / 100)
    >>> round(float(two_nn_of(np.ones(99), ratios)), 1)
    1.0
    """
    xp, nearest = as_float64(nearest)
    second = as_float64(second)[1]
    count = nearest.shape[-1]
    fitted = int(count * (1 - discard))
    if fitted < 2:
        return xp.full(nearest.shape[:-1], xp.nan, dtype=xp.float64, device=device(nearest))
    usable = min(fitted, count - 1)  # without discarding, the largest ratio has −ln(1 − 1) = ∞
    stretch = xp.log(xp.sort(second / nearest, axis=-1)[..., :usable])
    level = -xp.log(1 - xp.arange(1, usable + 1, dtype=xp.float64, device=device(nearest)) / count)
    # Least squares through the origin: slope Σxy / Σx².
    return ratio(xp, xp.sum(stretch * level, axis=-1), xp.sum(stretch * stretch, axis=-1))


def _distinct(xp: Any, points: Array) -> Array:
    """The rows without exact repetitions; in another order where there are some."""
    # Mostly there are none, and hashes of some eight columns are enough to show it.
    partial_hash = row_hash(xp, points[:, :: max(1, points.shape[1] // 8)])
    order = xp.argsort(partial_hash)
    if bool(xp.all(partial_hash[order[1:]] != partial_hash[order[:-1]])):
        return points
    points = points[xp.argsort(row_hash(xp, points))]
    is_new = xp.any(points[1:] != points[:-1], axis=-1)
    return xp.concat([points[:1], points[1:][is_new]])


def _nearest_two(xp: Any, points: Array) -> tuple[Array, Array]:
    """Distances (N,) of every point to the nearest and the second nearest other point."""
    count = points.shape[0]
    square = xp.linalg.vecdot(points, points)
    half = 0.5 * square
    block, pairs = max(1, BLOCK // max(points.shape)), []
    for start in range(0, count, block):
        part = slice(start, start + block)
        close = points[part] @ points.T
        close -= half  # ⟨x_i, x_j⟩ − ‖x_j‖²/2 = (‖x_i‖² − ‖x_i − x_j‖²)/2: the largest is the nearest
        index = xp.arange(close.shape[0], device=device(points))
        close[index, index + start] = -xp.inf  # the point itself
        pairs.append(_two_squares(xp, points, part, close, square[part]))
    both = xp.sqrt(xp.concat(pairs))
    return both[:, 0], both[:, 1]


def _two_squares(xp: Any, points: Array, part: slice, close: Array, square: Array) -> Array:
    """The two smallest squared distances (n, 2) of a part of the points; overwrites ``close``."""
    index = xp.arange(close.shape[0], device=device(points))
    first = xp.argmax(close, axis=-1)
    top = close[index, first]
    close[index, first] = -xp.inf
    least = square[:, None] - 2.0 * xp.stack([top, xp.max(close, axis=-1)], axis=-1)
    near = least[:, 0] <= NEAR * square
    if bool(xp.any(near)):
        # Rounding may have changed the order of the nearest: among six candidates (a heuristic) it is found again.
        others = _largest(xp, close[near], min(5, points.shape[0] - 2))
        least[near] = _by_differences(xp, points, points[part][near], [first[near], *others])
    return least


def _largest(xp: Any, values: Array, k: int) -> list[Array]:
    """Column indices of the k largest entries of each row; overwrites them. A few passes are faster than a sort."""
    found = []
    index = xp.arange(values.shape[0], device=device(values))
    for _ in range(k):
        found.append(xp.argmax(values, axis=-1))
        values[index, found[-1]] = -xp.inf
    return found


def _by_differences(xp: Any, points: Array, part: Array, candidates: list[Array]) -> Array:
    """The two smallest squared distances (n, 2) to candidates, accurate at any distance."""
    squares = []
    for index in candidates:
        difference = points[index] - part
        squares.append(xp.linalg.vecdot(difference, difference))
    return xp.sort(xp.stack(squares, axis=-1), axis=-1)[:, :2]
