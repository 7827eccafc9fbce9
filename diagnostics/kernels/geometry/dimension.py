"""On how many dimensions the cloud of tokens lies: TwoNN.

Shapes: ``...`` batch, ``N`` rows (tokens), ``d`` columns (features).
"""

from typing import Any

from array_api_compat import device

from diagnostics.kernels._arrays import Array, peak, ratio, row_hash, rows, selected

# Rows of a distance matrix held at once, in numbers: 32 MB of float64.
BLOCK = 4_000_000


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
    ValueError
        If ``discard`` is out of range or a row that counts holds NaN or infinities.

    Examples
    --------
    Points on a line, even gaps doubling: μ is the same for most, d is small and finite.

    >>> import numpy as np
    >>> bool(0.5 < two_nn(np.random.default_rng(0).random((200, 1)) @ np.ones((1, 5))) < 1.5)
    True
    """
    if not 0 <= discard < 1:
        raise ValueError(f"discard is {discard}; expected a share from 0 up to but not including 1")
    matrix = rows(x, mask=mask, center=True)
    xp = matrix.xp
    scaled = matrix._replace(values=matrix.values / peak(xp, matrix.values))
    each = [_two_nn(xp, points, discard) for points in selected(scaled)]
    return xp.reshape(xp.stack(each), matrix.values.shape[:-2])


def _two_nn(xp: Any, points: Array, discard: float) -> Array:
    """TwoNN of one cloud of points (N, d)."""
    undefined = xp.asarray(xp.nan, dtype=xp.float64, device=device(points))
    points = _distinct(xp, points)
    count = points.shape[0]
    fitted = int(count * (1 - discard))
    if count < 3 or fitted < 2:
        return undefined
    nearest, second = _nearest_two(xp, points)
    stretch = xp.log(xp.sort(second / nearest)[:fitted])
    share = xp.arange(1, fitted + 1, dtype=xp.float64, device=device(points)) / count
    usable = share < 1  # the last point of an uncut fit lies at infinity
    stretch, level = stretch[usable], -xp.log(1 - share[usable])
    return ratio(xp, xp.sum(stretch * level), xp.sum(stretch * stretch))


def _distinct(xp: Any, points: Array) -> Array:
    """The rows without exact repetitions, in another order."""
    if points.shape[0] < 2:
        return points
    points = points[xp.argsort(row_hash(xp, points), stable=True)]
    fresh = xp.any(points[1:] != points[:-1], axis=-1)
    return xp.concat([points[:1], points[1:][fresh]])


def _nearest_two(xp: Any, points: Array) -> tuple[Array, Array]:
    """Distances of every point to its two nearest others; candidates from Gram blocks, then differences."""
    count = points.shape[0]
    square = xp.sum(points * points, axis=-1)
    block, pairs = max(1, BLOCK // max(count, 8 * points.shape[1])), []
    for start in range(0, count, block):
        part = points[start : start + block]
        far = square - 2.0 * (part @ points.T)
        own = xp.arange(part.shape[0], device=device(points))
        far[own, own + start] = xp.inf
        close = _smallest(xp, far, min(6, count - 1))
        apart = points[close] - part[:, None, :]
        pairs.append(xp.sort(xp.sqrt(xp.sum(apart * apart, axis=-1)), axis=-1)[:, :2])
    both = xp.concat(pairs)
    return both[:, 0], both[:, 1]


def _smallest(xp: Any, values: Array, k: int) -> Array:
    """Where the k smallest entries of each row are (n, k); overwrites them, for passes beat a full sort."""
    found = []
    own = xp.arange(values.shape[0], device=device(values))
    for _ in range(k):
        found.append(xp.argmin(values, axis=-1))
        values[own, found[-1]] = xp.inf
    return xp.stack(found, axis=-1)
