"""How much of a gradient does the projection onto stochastic matrices let through? Its Jacobian, from its result alone."""

from typing import Any

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array
from depthscope.diagnostics.kernels.mixing._matrices import identity, square

KERNEL = 1e-13  # eigenvalues of sums of about 1 that are 0 up to rounding
PIVOT = 1e-8  # below, matrices nearly fall into blocks, and elimination would lose digits


def softmax_sensitivity(p: Array) -> Array:
    r"""Trace of the Jacobian of a softmax over rows, as a share of that at uniform rows.

    .. math:: \operatorname{tr} J = \textstyle\sum_{ij} p_{ij} (1 - p_{ij}), \qquad \operatorname{tr} J(1/n) = n - 1

    J = ∂P/∂H̃ is symmetric and positive semidefinite, so that its trace over n² is the mean share of a random direction's
    gradient that reaches the logits along it.

    Parameters
    ----------
    p
        Matrices (..., n, n) with rows that sum to 1.

    Returns
    -------
    Array
        (...), 1 for uniform rows, 0 for permutations.

    Raises
    ------
    InputError
        For 1 × 1 matrices.

    Examples
    --------
    >>> float(softmax_sensitivity([[0.5, 0.5], [1.0, 0.0]]))
    0.5
    """
    xp, p = square(p)
    if p.shape[-1] < 2:
        raise InputError("p is 1 × 1; expected matrices of two streams or more: one stream mixes nothing")
    return xp.sum(p * (1.0 - p), axis=(-2, -1)) / (p.shape[-1] - 1.0)


def sinkhorn_sensitivity(p: Array) -> Array:
    r"""Trace of the Jacobian of Sinkhorn in its limit, as a share of that at the uniform matrix.

    In the limit P = diag(a) exp(H̃) diag(b) has all sums 1, whose implicit derivative is

    .. math:: dP = P \circ (dH̃ - u 1^T - 1 v^T)

    with u and v such that the rows and columns of dP sum to 0. Hence, A being the map from (u, v) to u 1ᵀ + 1 vᵀ and D the
    diagonal matrix of the entries of P,

    .. math:: \operatorname{tr} J = \textstyle\sum_{ij} p_{ij} - \operatorname{tr}\big((A^T D A)^+ A^T D^2 A\big),
        \qquad \operatorname{tr} J(1/n) = (n - 1)^2 / n

    Parameters
    ----------
    p
        Doubly stochastic matrices (..., n, n).

    Returns
    -------
    Array
        (...), 1 for the uniform matrix, 0 for permutations.

    Raises
    ------
    InputError
        For 1 × 1 matrices.

    Examples
    --------
    >>> round(float(sinkhorn_sensitivity([[0.5, 0.5], [0.5, 0.5]])), 12)
    1.0
    >>> round(float(sinkhorn_sensitivity([[0.9, 0.1], [0.1, 0.9]])), 12)  # 4 p (1 − p)
    0.36
    """
    xp, p = square(p)
    if p.shape[-1] < 2:
        raise InputError("p is 1 × 1; expected matrices of two streams or more: one stream mixes nothing")
    n = p.shape[-1]
    flat = xp.reshape(p, (-1, n, n))
    lost, is_right = _lost_by_elimination(xp, flat)
    if not bool(xp.all(is_right)):
        lost[~is_right] = _lost_by_eigenvalues(xp, flat[~is_right])
    return (xp.sum(p, axis=(-2, -1)) - xp.reshape(lost, p.shape[:-2])) * n / (n - 1.0) ** 2


def _lost_by_elimination(xp: Any, p: Array) -> tuple[Array, Array]:
    """The trace that u and v take away, (m,), and where it is right: where P has no blocks, up to rounding.

    u is eliminated from AᵀDA = [[R, P], [Pᵀ, C]], R and C being the sums, which leaves S = C − Pᵀ R⁻¹ P. Its kernel, the
    constant vector, is that of what is left of AᵀD²A, so that S + 1 1ᵀ/n, which has an inverse, gives the trace of the
    pseudo-inverse.
    """
    n = p.shape[-1]
    # The matrices last in memory: the steps, which are few, run along them.
    P = xp.permute_dims(p, (1, 2, 0)) + 0.0
    squares, rows = P * P, xp.sum(P, axis=1)
    is_right = xp.all(rows > PIVOT, axis=0)
    over = 1.0 / xp.where(rows > PIVOT, rows, xp.ones_like(rows))
    scaled = P * over[:, None]  # R⁻¹ P
    of_rows, eye = xp.sum(squares, axis=1), identity(xp, p)[..., None]
    left = eye * xp.sum(P, axis=0)[None] - xp.einsum("ij...,ik...->jk...", P, scaled) + 1.0 / n
    crossed = xp.einsum("ij...,ik...->jk...", scaled, squares - 0.5 * of_rows[:, None] * scaled)
    of_square = eye * xp.sum(squares, axis=0)[None] - crossed - xp.permute_dims(crossed, (1, 0, 2))
    for k in range(n):  # Gauss and Jordan; of a positive matrix, no rows have to change places
        pivot, column = left[k, k], left[:, k] + 0.0
        is_right = is_right & (pivot > PIVOT)
        row = left[k] / xp.where(pivot > PIVOT, pivot, xp.ones_like(pivot))
        row[k] = 1.0 / xp.where(pivot > PIVOT, pivot, xp.ones_like(pivot))
        column[k] = 0.0
        left[:, k] = 0.0
        left = left - column[:, None] * row[None]
        left[k] = row
    return xp.sum(of_rows * over, axis=0) + xp.sum(left * of_square, axis=(0, 1)), is_right


def _lost_by_eigenvalues(xp: Any, p: Array) -> Array:
    """The same of any P, whatever its blocks."""
    values, vectors = xp.linalg.eigh(_margins(xp, p))
    # What goes from u to v changes nothing, in each block where P has blocks: eigenvalue 0 here, and of AᵀD²A too.
    kept = values > KERNEL
    of_square = xp.sum(vectors * (_margins(xp, p * p) @ vectors), axis=-2)
    shares = xp.where(kept, of_square / xp.where(kept, values, xp.ones_like(values)), xp.zeros_like(values))
    return xp.sum(shares, axis=-1)


def _margins(xp: Any, p: Array) -> Array:
    """AᵀDA (..., 2n, 2n): row and column sums on the diagonal, the matrix and its transpose off it."""
    eye, turned = identity(xp, p), xp.matrix_transpose(p)
    rows, columns = xp.sum(p, axis=-1)[..., None] * eye, xp.sum(p, axis=-2)[..., None] * eye
    upper = xp.concat([rows, p], axis=-1)
    return xp.concat([upper, xp.concat([turned, columns], axis=-1)], axis=-2)
