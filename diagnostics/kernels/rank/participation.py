"""How many directions take part, and how many would with more rows? The participation ratio and its corrections.

Shapes: ``...`` batch, ``N`` rows (tokens), ``d`` columns (features), ``k = min(N, d)`` singular values s.
"""

from typing import Any

from array_api_compat import array_namespace

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array, gram, ratio, rows, scaled
from depthscope.diagnostics.kernels.rank.spectrum import as_spectrum


def participation_ratio_of(s: Array) -> Array:
    """Participation ratio of singular values: (Σσ²)² / Σσ⁴.

    Parameters
    ----------
    s
        Singular values (..., k), in any order, zeros allowed.

    Returns
    -------
    Array
        (...), between 1 and k; NaN where all are zero.

    Examples
    --------
    >>> float(participation_ratio_of([1.0, 1.0, 0.0]))
    2.0
    """
    xp, s = as_spectrum(s)
    energy = s * s
    return ratio(xp, xp.sum(energy, axis=-1) ** 2, xp.sum(energy * energy, axis=-1))


def participation_ratio(
    x: Array, *, center: bool = False, correct: str | None = None, mask: Array | None = None
) -> Array:
    """Participation ratio (Σλ)² / Σλ², as it is or corrected for the finite sample.

    The plain value is biased: 1/naive ≈ 1/N + 1/d + 1/γ. ``correct="rows"`` removes the bias of sampled rows
    by keeping row indices distinct in numerator and denominator (a ratio of two U-statistics, the denominator
    being HSIC₁(K, K)); ``"both"`` keeps column indices distinct too. A corrected value is an estimate: it
    may exceed min(N, d), and it is negative where the data cannot tell its denominator from zero.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    center
        Remove the mean row first (the corrected estimators then equal those of PyPI's ``dimensionality``).
    correct
        ``None``, ``"rows"`` or ``"both"``.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...); NaN for a zero matrix and where the correction needs more rows (4 centred, 2 uncentred) or
        columns (2). Source: Chun et al. 2509.26560.

    Raises
    ------
    InputError
        If ``correct`` is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> float(participation_ratio(np.diag([1.0, 1.0, 0.0])))
    2.0
    """
    if correct not in (None, "rows", "both"):
        raise InputError(f"correct is {correct!r}; expected None, 'rows' or 'both'")
    matrix = rows(x, mask=mask, center=center)
    xp = matrix.xp
    # Numerator and denominator have the same units: the scale needs no correction.
    trace, square, diagonal = _quartic_sums(xp, scaled(matrix)[0], distinct_columns=correct == "both")
    if correct is None:
        return ratio(xp, trace, square)
    return corrected_ratio(trace, square, diagonal, matrix.count, center=center)


def corrected_ratio(trace: Array, square: Array, diagonal: Array, count: Array, *, center: bool) -> Array:
    """Participation ratio without the bias of sampled rows, from sums over K = XXᵀ.

    ``trace, square, diagonal``: (tr K)², ‖K‖² and Σ K_ii², (...).
    Returns: (...); NaN for fewer than four rows, two of them uncentred.

    Examples
    --------
    >>> import numpy as np
    >>> one = np.asarray(1.0)
    >>> float(corrected_ratio(9.0 * one, 3.5 * one, 3.0 * one, 3.0 * one, center=False))
    12.0
    """
    xp, n = array_namespace(trace), count
    enough = n >= (4 if center else 2)
    # Σ over distinct rows i ≠ j only: E K_ii K_jj and E K_ij² of different samples, without the squares K_ii² that
    # bias both sums; the number of such pairs divides out.
    if center:
        # Song's HSIC₁ for K1 = 0 (see similarity.cka): the estimated mean links rows, which the terms in 1/(n−2) undo.
        n = xp.where(enough, n, 4.0 * xp.ones_like(n))
        pairs, link = n / (n - 2.0), 1.0 / ((n - 1.0) * (n - 2.0))
        over = trace - pairs * diagonal + link * (2.0 * square - trace)
        under = square - pairs * diagonal + link * trace
    else:
        over, under = trace - diagonal, square - diagonal
    return xp.where(enough, ratio(xp, over, under), xp.full_like(over, xp.nan))


def _quartic_sums(xp: Any, x: Array, *, distinct_columns: bool) -> tuple[Array, Array, Array]:
    """(tr K)², ‖K‖² and Σ K_ii² of K = XXᵀ, or the same over pairs of distinct columns."""
    energy = x * x
    square = xp.sum(gram(xp, x) ** 2, axis=(-2, -1))
    trace = xp.sum(energy, axis=(-2, -1)) ** 2
    diagonal = xp.sum(xp.sum(energy, axis=-1) ** 2, axis=-1)
    if not distinct_columns:
        return trace, square, diagonal
    same = xp.sum(xp.sum(energy, axis=-2) ** 2, axis=-1)
    return trace - same, square - same, diagonal - xp.sum(energy * energy, axis=(-2, -1))
