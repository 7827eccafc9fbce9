"""What remains of the differences between streams? Products on the complement of their mean."""

import math
from typing import Any

from array_api_compat import device

from depthscope.diagnostics.kernels._arrays import Array
from depthscope.diagnostics.kernels.mixing._matrices import as_given, log
from depthscope.diagnostics.kernels.mixing.products import prefix_composites, stacked, unstacked
from depthscope.diagnostics.kernels.mixing.singular import singular_values


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
