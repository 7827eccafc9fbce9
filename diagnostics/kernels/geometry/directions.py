"""In which direction do tokens point, and how far are they turned? Cosines, angles, block influence.

Shapes: ``...`` batch, ``N`` rows (tokens, in order), ``d`` columns (features).
"""

from typing import Any

from array_api_compat import array_namespace

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array, masked_mean, ratio, rows, unit_rows

# Centred rows shorter than this share of the longest are the rounding of rows at the mean (some 1e-16, with a margin of
# ours): they have no direction.
ROUNDING = 1e-14


def token_cosine(x: Array, *, center: bool = False, mask: Array | None = None) -> Array:
    """Mean cosine between different tokens: (‖Σu‖² − Σ‖u‖²) / (m(m − 1)) with the unit vectors u = x/‖x‖.

    Exact over all m(m − 1)/2 pairs at the price of one sum. Zero rows, and with ``center`` rows at the mean,
    have no direction and do not count.

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

    Examples
    --------
    Three pairs: one parallel, two orthogonal.

    >>> import numpy as np
    >>> float(token_cosine(np.array([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0]])).round(12)) == round(1 / 3, 12)
    True
    """
    total, pairs = pair_cosines(x, center=center, mask=mask)
    return ratio(array_namespace(total), total, pairs)


def pair_cosines(x: Array, *, center: bool = False, mask: Array | None = None) -> tuple[Array, Array]:
    """Σ_{i≠j} ⟨u_i, u_j⟩ over all ordered pairs of rows that have a direction, and the number m(m − 1) of pairs."""
    matrix = rows(x, mask=mask, center=center)
    xp, values = matrix.xp, matrix.values
    # Of float32 input squares cannot leave float64: its rows are weighted by 1/‖x‖ in the sum, and unit rows, another
    # array of the size of x, are not made.
    if matrix.narrow:
        size = length = xp.sqrt(xp.linalg.vecdot(values, values))
    else:
        values, length = unit_rows(xp, values)
        size = xp.ones_like(length)
    directed = length > (ROUNDING if center else 0.0) * xp.max(length, axis=-1, keepdims=True)
    # Σ_{i≠j} ⟨u_i, u_j⟩ = ‖Σ u‖² − m: N d operations for N² pairs.
    weight = xp.astype(directed, xp.float64) / xp.where(directed, size, xp.ones_like(size))
    total = (weight[..., None, :] @ values)[..., 0, :]
    m = xp.sum(xp.astype(directed, xp.float64), axis=-1)
    return xp.linalg.vecdot(total, total) - m, m * xp.clip(m - 1.0, min=0.0)


def _paired_rows(x: Array, y: Array, mask: Array | None) -> tuple[Any, Array, Array, Array]:
    """Unit rows of two batches of the same shape, and which pairs have a direction on both sides."""
    a, b = rows(x, mask=mask), rows(y, mask=mask, name="y")
    if a.values.shape != b.values.shape:
        raise InputError(
            f"x and y have shapes {tuple(a.values.shape)} and {tuple(b.values.shape)}; expected equal shapes"
        )
    xp = a.xp
    (u, length_u), (w, length_w) = unit_rows(xp, a.values), unit_rows(xp, b.values)
    valid = (length_u > 0) & (length_w > 0)
    return xp, u, w, valid if a.mask is None else valid & a.mask


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
    InputError
        If the shapes differ.

    Examples
    --------
    >>> import numpy as np
    >>> row_cosine(np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[0.0, 3.0], [0.0, 1.0]])).tolist()
    [0.0, 1.0]
    """
    xp, u, w, valid = _paired_rows(x, y, mask)
    cosine = xp.linalg.vecdot(u, w)
    return xp.where(valid, cosine, xp.full_like(cosine, xp.nan))


def _angles(xp: Any, u: Array, w: Array) -> Array:
    """Angles between unit rows, 2 atan2(‖u − w‖, ‖u + w‖) (Kahan): accurate near 0 and π, where arccos is not."""
    difference, total = u - w, u + w
    sine = xp.sqrt(xp.linalg.vecdot(difference, difference))  # 2 sin(θ/2)
    cosine = xp.sqrt(xp.linalg.vecdot(total, total))  # 2 cos(θ/2)
    return 2.0 * xp.atan2(sine, cosine)


def angular_distance(x: Array, y: Array, *, mask: Array | None = None) -> Array:
    """Mean angle between each row of x and the same row of y, as a share of π: arccos(cos)/π.

    Computed as 2 atan2(‖u − w‖, ‖u + w‖)/π, accurate down to angles of 1e-16.

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
    InputError
        If the shapes differ.

    Examples
    --------
    >>> import numpy as np
    >>> float(angular_distance(np.array([[1.0, 0.0]]), np.array([[0.0, 5.0]])))
    0.5
    """
    xp, u, w, valid = _paired_rows(x, y, mask)
    return masked_mean(xp, _angles(xp, u, w) / xp.pi, valid)


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
    InputError
        If the shapes differ.

    Examples
    --------
    >>> import numpy as np
    >>> float(block_influence(np.array([[1.0, 0.0]]), np.array([[-1.0, 0.0]])))
    2.0
    """
    xp, u, w, valid = _paired_rows(x, y, mask)
    # 1 − ⟨u, w⟩ would cancel: a block that moves states by 1e-8 has an influence of 5e-17.
    difference = u - w
    return masked_mean(xp, xp.linalg.vecdot(difference, difference) / 2.0, valid)
