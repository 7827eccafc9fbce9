"""Which directions of the streams grow, fade or vanish? Eigenvalues, singular values, products that collapse."""

import math
from typing import Any

from array_api_compat import array_namespace, device

from depthscope.diagnostics.kernels._arrays import Array, peak
from depthscope.diagnostics.kernels.mixing._matrices import as_given, log, square, square_in_memory
from depthscope.diagnostics.kernels.mixing.products import prefix_composites, stacked, unstacked


def eigenvalues(p: Array) -> Array:
    """Eigenvalues, complex, in descending order of magnitude.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Array
        (..., n), complex128.

    Examples
    --------
    >>> eigenvalues([[0.5, 0.5], [0.5, 0.5]]).real.round(12).tolist()
    [1.0, 0.0]
    """
    xp, p = square(p)
    # numpy returns real numbers where all eigenvalues are: always complex here, and an order that does not depend on it.
    values = xp.astype(xp.linalg.eigvals(p), xp.complex128)
    return xp.take_along_axis(values, xp.argsort(-xp.abs(values), axis=-1, stable=True), axis=-1)


def singular_values(p: Array) -> Array:
    """Singular values of small matrices, descending, to LAPACK's accuracy (an error of some 1e-15 σ₁).

    Two streams have a closed form.

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


def _difference_basis(xp: Any, p: Array) -> Array:
    """Orthonormal columns (n, n − 1) that span the complement of the ones vector (Helmert)."""
    n = p.shape[-1]
    basis = xp.zeros((n, n - 1), dtype=xp.float64, device=device(p))
    for k in range(1, n):
        basis[:k, k - 1] = 1.0 / math.sqrt(k * (k + 1))
        basis[k, k - 1] = -k / math.sqrt(k * (k + 1))
    return basis


def deflated_gain(h: Array) -> Array:
    """Stream-product collapse: ln σ₁ of each prefix product on the complement of ones.

    The (n−1)×(n−1) blocks UᵀHU are multiplied, not H itself, with a log scale: the value decreases further
    where ‖P − J/n‖ stops at 1e-16. For row- or column-stochastic matrices the product of blocks is
    the block of the product; for free matrices it leaves out what passes through the mean.

    Parameters
    ----------
    h
        (L, ..., n, n), from the first layer to the last.

    Returns
    -------
    Array
        (L, ...), natural logarithm of the gain: below ln 0.01 all streams carry the same signal. −inf for
        an exactly zero block, NaN for a single stream.

    Examples
    --------
    Averaging two streams half-way, twice: differences halve each time.

    >>> h = [[[0.75, 0.25], [0.25, 0.75]]] * 2
    >>> [round(math.exp(v), 12) for v in deflated_gain(h)]
    [0.5, 0.25]
    """
    xp, stack, batch = stacked(h)
    if stack.shape[1] == 1:  # one stream has no differences
        return as_given(h, xp.full((len(stack), *batch), xp.nan, dtype=xp.float64, device=device(stack)))
    basis = _difference_basis(xp, stack[..., 0])
    blocks = xp.einsum("lajb,jc->lacb", xp.einsum("ia,lijb->lajb", basis, stack), basis)
    p, log_scale = prefix_composites(unstacked(xp, blocks, batch), return_log_scale=True)
    return as_given(h, log(xp, singular_values(p)[..., 0]) + log_scale)
