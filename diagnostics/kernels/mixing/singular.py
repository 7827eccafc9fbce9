"""How much does a mixing matrix stretch? Singular values of many small matrices."""

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from depthscope.diagnostics.kernels._arrays import Array, peak
from depthscope.diagnostics.kernels.mixing._compiled_jacobi import worth_compiling
from depthscope.diagnostics.kernels.mixing._jacobi import ROUNDS, small_singular_values
from depthscope.diagnostics.kernels.mixing._matrices import as_given, square_in_memory

# Matrices of one block: 16 entries each and the arrays of a rotation, some 2 MB, stay in the cache. Below 256 matrices
# the some hundred calls of the rotations cost as much as LAPACK. Heuristics of ours.
BLOCK, FEW = 8192, 256


def singular_values(p: Array) -> Array:
    """Singular values of small matrices, descending, to LAPACK's accuracy (an error of some 1e-15 σ₁).

    Two streams have a closed form; three and four are rotated many matrices at a time.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Array
        (..., n).

    Examples
    --------
    >>> singular_values([[0.0, 2.0], [1.0, 0.0]]).tolist()
    [2.0, 1.0]
    """
    xp, matrices = square_in_memory(p)
    n = matrices.shape[-1]
    if n == 1:
        return as_given(p, xp.abs(matrices[..., 0]))
    many = isinstance(matrices, np.ndarray) and matrices.size >= FEW * n * n
    if many and (n == 2 or n in ROUNDS):
        return as_given(p, _of_many(matrices))
    if n == 2:
        scale = peak(xp, matrices)
        entries = [(matrices / scale)[..., i, j] for i in (0, 1) for j in (0, 1)]
        return as_given(p, xp.stack(_of_two(xp, *entries), axis=-1) * scale[..., 0])
    given = as_given(p, matrices)
    return array_namespace(given).linalg.svdvals(given)


def _of_two(xp: Any, a: Array, b: Array, c: Array, d: Array) -> list[Array]:
    """Singular values of [[a, b], [c, d]] with a largest entry of 1: σ₁ in closed form, σ₂ = |det|/σ₁.

    σ₁ ± σ₂ are the sizes of the two conformal parts of the matrix. Their difference would lose a small σ₂; the
    determinant has it with an error of 1e-16 σ₁.
    """
    first = (xp.sqrt((a + d) ** 2 + (b - c) ** 2) + xp.sqrt((a - d) ** 2 + (b + c) ** 2)) / 2.0
    second = xp.abs(a * d - b * c) / xp.where(first > 0, first, xp.ones_like(first))
    return [first, xp.minimum(first, second)]


def _of_many(p: np.ndarray) -> np.ndarray:
    """Singular values of matrices of 2×2 to 4×4 in blocks with the batch last; doubtful ones again by LAPACK."""
    n = p.shape[-1]
    flat = p.reshape(-1, n * n)
    found, compiled = np.empty((len(flat), n)), worth_compiling(len(flat))
    for start in range(0, len(flat), BLOCK):
        part = flat[start : start + BLOCK]
        # A copy, also where the batch is last already: it is overwritten.
        entries = np.array(part.T, order="C")
        top = np.abs(entries).max(axis=0)  # the thresholds of the rotations are for entries up to 1
        top[top == 0] = 1.0
        entries /= top
        if n == 2:
            for column, value in enumerate(_of_two(np, *entries)):
                np.multiply(value, top, out=found[start : start + BLOCK, column])
            continue
        values, doubtful = small_singular_values(entries.reshape(n, n, -1), compiled=compiled)
        values *= top
        found[start : start + BLOCK] = values.T
        if doubtful.any():
            again = np.linalg.svd(part[doubtful].reshape(-1, n, n), compute_uv=False)
            found[start : start + BLOCK][doubtful] = again
    return found.reshape(p.shape[:-1])
