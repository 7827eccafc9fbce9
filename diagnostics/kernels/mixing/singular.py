"""How much does a mixing matrix stretch? Singular values of many small matrices."""

from typing import Any

from array_api_compat import array_namespace

from depthscope.diagnostics.kernels._arrays import Array, peak
from depthscope.diagnostics.kernels.mixing._matrices import as_given, square_in_memory


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
