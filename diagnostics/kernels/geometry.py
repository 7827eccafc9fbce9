"""How tokens lie in feature space, and how far a layer moves them.

Shapes: ``...`` batch, ``N`` rows (tokens, in order), ``d`` columns (features).
"""

from typing import Any, NamedTuple

from array_api_compat import device

from diagnostics.kernels._arrays import (
    Array,
    as_float64,
    masked_mean,
    peak,
    ratio,
    rows,
    selected,
    unit_rows,
)
from diagnostics.kernels.rank import singular_values

# Rows of a distance matrix held at once, in numbers: 32 MB of float64.
BLOCK = 4_000_000


def _kept(xp: Any, length: Array, mask: Array | None) -> Array:
    """Rows that count and are not zero, (..., N)."""
    return length > 0 if mask is None else (length > 0) & mask


def token_cosine(x: Array, *, center: bool = False, mask: Array | None = None) -> Array:
    """Mean cosine between different tokens: (‖Σu‖² − Σ‖u‖²) / (m(m − 1)) with the unit vectors u = x/‖x‖.

    Exact over all m(m − 1)/2 pairs at the price of one sum. Zero rows have no direction and do not count.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    center
        Remove the mean row first (the mean-removed anisotropy).
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), between −1/(m − 1) and 1; NaN with fewer than two rows that have a direction.

    Raises
    ------
    ValueError
        If a row that counts holds NaN or infinities.

    Examples
    --------
    Three pairs: one parallel, two orthogonal.

    >>> import numpy as np
    >>> float(token_cosine(np.array([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0]])).round(12)) == round(1 / 3, 12)
    True
    """
    matrix = rows(x, mask=mask, center=center)
    xp = matrix.xp
    unit, length = unit_rows(xp, matrix.values)
    m = xp.sum(xp.astype(length > 0, xp.float64), axis=-1)
    total = xp.sum(unit, axis=-2)
    pairs = xp.sum(total * total, axis=-1) - xp.sum(unit * unit, axis=(-2, -1))
    return ratio(xp, pairs, m * xp.clip(m - 1.0, min=0.0))


def _angles(xp: Any, u: Array, w: Array) -> Array:
    """Angles between unit rows, 2 atan2(‖u − w‖, ‖u + w‖): accurate near 0 and near π."""
    apart, together = u - w, u + w
    half = xp.atan2(xp.sqrt(xp.sum(apart * apart, axis=-1)), xp.sqrt(xp.sum(together * together, axis=-1)))
    return 2.0 * half


def curvature(x: Array, *, mask: Array | None = None) -> Array:
    """Mean turning angle of the token path: the angle between v_k = x_{k+1} − x_k and v_{k+1}.

    Equal neighbours give a step without direction, whose angles do not count. Masked rows drop out of the
    path: the rows around them become neighbours.

    Parameters
    ----------
    x
        Token paths (..., N, d), rows in order.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), in radians between 0 (straight) and π (back and forth); NaN without two successive steps.
        Source: Skean et al. 2502.02013, after Hosseini & Fedorenko 2023.

    Raises
    ------
    ValueError
        If a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> float(np.degrees(curvature(np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]))).round(9))
    90.0
    """
    matrix = rows(x, mask=mask)
    xp, path = matrix.xp, matrix.values
    if matrix.mask is not None:
        order = xp.argsort(xp.astype(~matrix.mask, xp.int64), axis=-1, stable=True)
        path = xp.take_along_axis(path, xp.broadcast_to(order[..., None], path.shape), axis=-2)
    if path.shape[-2] < 3:
        return xp.full_like(matrix.count, xp.nan)
    unit, length = unit_rows(xp, path[..., 1:, :] - path[..., :-1, :])
    moved = (length > 0) & (xp.arange(1, path.shape[-2], device=device(path)) < matrix.count[..., None])
    angles = _angles(xp, unit[..., 1:, :], unit[..., :-1, :])
    return masked_mean(xp, angles, moved[..., 1:] & moved[..., :-1])


def dirichlet_energy(x: Array, *, graph: str = "complete", mask: Array | None = None) -> Array:
    """Dirichlet energy of the token graph: tr(XᵀLX) / ‖X‖_F², ½ Σ_ij A_ij ‖x_i − x_j‖² over ‖X‖².

    ``"complete"`` links every pair with weight 1/N, so that L = I − 11ᵀ/N (what uniform attention leaves)
    and the value lies between 0 and 1; ``"path"`` links each token to the next with weight 1, between 0
    and 4.

    Parameters
    ----------
    x
        Matrices (..., N, d), rows in order.
    graph
        ``"complete"`` or ``"path"``.
    mask
        Booleans (..., N), False for rows that do not count; the path skips them.

    Returns
    -------
    Array
        (...); 0 when all rows are equal, NaN for a zero matrix.

    Raises
    ------
    ValueError
        If ``graph`` is unknown or a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0], [-1.0], [0.0]])
    >>> float(dirichlet_energy(x)), float(dirichlet_energy(x, graph="path"))
    (1.0, 2.5)
    """
    if graph not in ("complete", "path"):
        raise ValueError(f"graph is {graph!r}; expected 'complete' or 'path'")
    matrix = rows(x, mask=mask)
    xp, values = matrix.xp, matrix.values
    scale = peak(xp, values)
    complete = graph == "complete"
    apart = rows(x, mask=mask, center=True).values if complete else _steps(xp, values, matrix.mask)
    return ratio(xp, _energy(xp, apart / scale), _energy(xp, values / scale))


def _energy(xp: Any, x: Array) -> Array:
    """‖X‖_F², (...)."""
    return xp.sum(x * x, axis=(-2, -1))


def _steps(xp: Any, x: Array, mask: Array | None) -> Array:
    """Differences of successive rows that count; rows past the last one are zero."""
    if mask is None:
        return x[..., 1:, :] - x[..., :-1, :]
    order = xp.argsort(xp.astype(~mask, xp.int64), axis=-1, stable=True)
    x = xp.take_along_axis(x, xp.broadcast_to(order[..., None], x.shape), axis=-2)
    linked = xp.take_along_axis(mask, order, axis=-1)[..., 1:, None]
    return xp.where(linked, x[..., 1:, :] - x[..., :-1, :], xp.zeros_like(x[..., 1:, :]))


def _paired_rows(x: Array, y: Array, mask: Array | None) -> tuple[Any, Array, Array, Array]:
    """Unit rows of two batches of the same shape, and which pairs have a direction on both sides."""
    a, b = rows(x, mask=mask), rows(y, mask=mask, name="y")
    if a.values.shape != b.values.shape:
        raise ValueError(
            f"x and y have shapes {tuple(a.values.shape)} and {tuple(b.values.shape)}; expected equal shapes"
        )
    xp = a.xp
    (u, length_u), (w, length_w) = unit_rows(xp, a.values), unit_rows(xp, b.values)
    return xp, u, w, _kept(xp, length_u, a.mask) & _kept(xp, length_w, b.mask)


def row_cosine(x: Array, y: Array, *, mask: Array | None = None) -> Array:
    """Cosine of each row of x with the same row of y.

    Parameters
    ----------
    x, y
        Matrices (..., N, d) of the same shape.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (..., N), between −1 and 1; NaN for masked rows and where either row is zero.

    Raises
    ------
    ValueError
        If the shapes differ or a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> row_cosine(np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[0.0, 3.0], [0.0, 1.0]])).tolist()
    [0.0, 1.0]
    """
    xp, u, w, keep = _paired_rows(x, y, mask)
    cosine = xp.sum(u * w, axis=-1)
    return xp.where(keep, cosine, xp.full_like(cosine, xp.nan))


def angular_distance(x: Array, y: Array, *, mask: Array | None = None) -> Array:
    """Mean angle between each row of x and the same row of y, as a share of π: arccos(cos)/π.

    Computed as 2 atan2(‖u − w‖, ‖u + w‖)/π, right down to angles of 1e-16.

    Parameters
    ----------
    x, y
        Matrices (..., N, d) of the same shape: states before and after.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), between 0 (same direction) and 1 (opposite); NaN when no pair has a direction.
        Source: Gromov et al. 2403.17887.

    Raises
    ------
    ValueError
        If the shapes differ or a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> float(angular_distance(np.array([[1.0, 0.0]]), np.array([[0.0, 5.0]])))
    0.5
    """
    xp, u, w, keep = _paired_rows(x, y, mask)
    return masked_mean(xp, _angles(xp, u, w) / xp.pi, keep)


def block_influence(x: Array, y: Array, *, mask: Array | None = None) -> Array:
    """Block influence: mean of 1 − cos(x_i, y_i) over rows, computed as ‖u − w‖²/2.

    Parameters
    ----------
    x, y
        Matrices (..., N, d) of the same shape: states before and after.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), between 0 (no change of direction) and 2; NaN when no pair has a direction.
        Source: Men et al. 2403.03853 (ShortGPT).

    Raises
    ------
    ValueError
        If the shapes differ or a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> float(block_influence(np.array([[1.0, 0.0]]), np.array([[-1.0, 0.0]])))
    2.0
    """
    xp, u, w, keep = _paired_rows(x, y, mask)
    return masked_mean(xp, xp.sum((u - w) ** 2, axis=-1) / 2.0, keep)


def massive_activations(
    x: Array, *, absolute: float = 100.0, relative: float = 1000.0, mask: Array | None = None
) -> Array:
    """Which entries are massive: magnitude above ``absolute`` and above ``relative`` × the matrix's median.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    absolute
        Least magnitude, in the units of ``x``.
    relative
        Least multiple of the median magnitude over the rows that count.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        Booleans (..., N, d), False in masked rows. Source: Sun et al. 2402.17762.

    Raises
    ------
    ValueError
        If a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.full((3, 2), 0.1)
    >>> x[1, 0] = -500.0
    >>> massive_activations(x).tolist()
    [[False, False], [True, False], [False, False]]
    """
    matrix = rows(x, mask=mask)
    xp = matrix.xp
    size = xp.abs(matrix.values)
    large = size > absolute
    if not bool(xp.any(large)):
        return large
    return large & (size > relative * _median_entry(xp, size, matrix.mask, matrix.count)[..., None, None])


def _median_entry(xp: Any, size: Array, mask: Array | None, count: Array) -> Array:
    """The median over the entries of the rows that count, (...)."""
    width = size.shape[-1]
    if mask is not None:
        size = xp.where(mask[..., None], size, xp.full_like(size, xp.inf))
    ordered = xp.sort(xp.reshape(size, (*size.shape[:-2], -1)), axis=-1)
    entries = xp.astype(count, xp.int64) * width
    last = ordered.shape[-1] - 1
    pair = xp.stack([(entries - 1) // 2, entries // 2], axis=-1)
    return xp.mean(xp.take_along_axis(ordered, xp.clip(pair, min=0, max=last), axis=-1), axis=-1)


def massive_tokens(
    x: Array, *, absolute: float = 100.0, relative: float = 1000.0, mask: Array | None = None
) -> Array:
    """Which tokens hold a massive activation; ``mask=~massive_tokens(x)`` gives any number without them.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    absolute
        Least magnitude, in the units of ``x``.
    relative
        Least multiple of the median magnitude.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        Booleans (..., N). Source: Sun et al. 2402.17762.

    Raises
    ------
    ValueError
        If a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> massive_tokens(np.array([[0.1, 0.1], [0.1, 200.0], [0.1, 0.1]])).tolist()
    [False, True, False]
    """
    massive = massive_activations(x, absolute=absolute, relative=relative, mask=mask)
    return rows(x, mask=mask).xp.any(massive, axis=-1)


class PowerLaw(NamedTuple):
    """A power law λ_i ∝ i^(−alpha) fitted to a spectrum by least squares in log-log."""

    alpha: Array  # (...), the exponent; NaN where fewer than three values are positive
    error: Array  # (...), its standard error
    residual: Array  # (...), root mean square of the misfit in ln λ
    first: int  # the first index fitted, counted from 1
    last: Array  # (...), the last one


def alpha_req_of(s: Array, *, first: int = 11, last: int | None = 500) -> PowerLaw:
    """Power-law exponent α of a spectrum: σ_i² ∝ i^(−α) over first ≤ i ≤ last.

    Parameters
    ----------
    s
        Singular values (..., k), descending.
    first
        The first index that is fitted, counted from 1 (the leading ones are rarely on the law).
    last
        The last index; shortened to the positive values that there are, all of them when ``None``.

    Returns
    -------
    PowerLaw
        The exponent, its standard error, the misfit and the range. Source: Agrawal et al., NeurIPS 2022.

    Raises
    ------
    ValueError
        If the range is empty.

    Examples
    --------
    >>> import numpy as np
    >>> fit = alpha_req_of(1.0 / np.arange(1.0, 101.0), first=5)
    >>> float(fit.alpha.round(9)), int(fit.last)
    (2.0, 100)
    """
    if first < 1 or (last is not None and last <= first):
        raise ValueError(f"the range is {first} to {last}; expected 1 ≤ first < last, indices counted from 1")
    xp, s = as_float64(s, name="s")
    index = xp.arange(1, s.shape[-1] + 1, dtype=xp.float64, device=device(s))
    fitted = (s > 0) & (index >= first) & (index <= (last or s.shape[-1]))
    logs = 2.0 * xp.log(xp.where(fitted, s, xp.ones_like(s)))
    steps = xp.broadcast_to(xp.log(index), s.shape)
    last_fitted = xp.max(xp.where(fitted, index, xp.zeros_like(s)), axis=-1)
    return PowerLaw(*_line(xp, steps, logs, fitted), first, xp.astype(last_fitted, xp.int64))


def _line(xp: Any, t: Array, y: Array, keep: Array) -> tuple[Array, Array, Array]:
    """Least squares y = c − αt over the kept points: α, its standard error, the root mean square misfit."""
    count = xp.sum(xp.astype(keep, xp.float64), axis=-1)
    dt = xp.where(keep, t - masked_mean(xp, t, keep)[..., None], xp.zeros_like(t))
    dy = xp.where(keep, y - masked_mean(xp, y, keep)[..., None], xp.zeros_like(t))
    enough = count >= 3
    spread = xp.where(enough, xp.sum(dt * dt, axis=-1), xp.zeros_like(count))
    alpha = -ratio(xp, xp.sum(dt * dy, axis=-1), spread)
    misfit = xp.sum((dy + alpha[..., None] * dt) ** 2, axis=-1)
    error = xp.sqrt(ratio(xp, misfit, xp.where(enough, count - 2.0, 0.0 * count) * spread))
    return alpha, error, xp.sqrt(ratio(xp, misfit, count))


def alpha_req(
    x: Array,
    *,
    first: int = 11,
    last: int | None = 500,
    center: bool = True,
    mask: Array | None = None,
) -> PowerLaw:
    """α-ReQ: power-law exponent of the covariance eigenvalues, λ_i ∝ i^(−α) over first ≤ i ≤ last.

    Parameters
    ----------
    x
        Matrices (..., N, d); a single spectrum (k,) of singular values is fitted as it is.
    first, last
        The range of indices, counted from 1; shortened to the positive eigenvalues that there are.
    center
        Remove the mean row first (a covariance; the default).
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    PowerLaw
        The exponent, its standard error, the misfit and the range. Source: Agrawal et al., NeurIPS 2022.

    Raises
    ------
    ValueError
        If the range is empty or a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> float(alpha_req(np.diag(1.0 / np.arange(1.0, 33.0)), first=4, center=False).alpha.round(9))
    2.0
    """
    spectrum = getattr(x, "ndim", 1) == 1
    return alpha_req_of(
        x if spectrum else singular_values(x, center=center, mask=mask), first=first, last=last
    )


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
    each = [_two_nn(xp, points, discard) for points in selected(matrix)]
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
    weights = xp.sin(xp.arange(1, points.shape[1] + 1, dtype=xp.float64, device=device(points)))
    points = points[xp.argsort(xp.sum(points * weights, axis=-1), stable=True)]
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
