"""What remains of the differences between streams? Products on the complement of their mean, and growth rates."""

import math
from typing import Any

from array_api_compat import device

from depthscope.diagnostics.kernels._arrays import Array
from depthscope.diagnostics.kernels.mixing._matrices import as_given, identity, log, square
from depthscope.diagnostics.kernels.mixing.products import (
    prefix_composites,
    stacked,
    suffix_composites,
    unstacked,
)
from depthscope.diagnostics.kernels.mixing.singular import singular_values


def _difference_basis(xp: Any, p: Array) -> Array:
    """Orthonormal columns (n, n − 1) that span the complement of the ones vector (Helmert)."""
    n = p.shape[-1]
    basis = xp.zeros((n, n - 1), dtype=xp.float64, device=device(p))
    for k in range(1, n):
        basis[:k, k - 1] = 1.0 / math.sqrt(k * (k + 1))
        basis[k, k - 1] = -k / math.sqrt(k * (k + 1))
    return basis


def deflated_gain(h: Array, *, reverse: bool = False) -> Array:
    """Stream-product collapse: ln σ₁ of each prefix (or suffix) product on the complement of ones.

    The (n−1)×(n−1) blocks UᵀHU are multiplied, not H itself, with a log scale: the value decreases further
    where ‖P − J/n‖ stops at 1e-16. For row- or column-stochastic matrices the product of blocks is
    the block of the product; for free matrices it leaves out what passes through the mean.

    Parameters
    ----------
    h
        (L, ..., n, n), from the first layer to the last.
    reverse
        Products to the output, H_L … H_l, in place of those from the input.

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
    products = suffix_composites if reverse else prefix_composites
    p, log_scale = products(unstacked(xp, blocks, batch), return_log_scale=True)
    return as_given(h, log(xp, singular_values(p)[..., 0]) + log_scale)


def lyapunov_spectrum(h: Array) -> Array:
    """Lyapunov spectrum of the depth product: (1/L) Σ_l ln|R_ii| with H_l Q_{l−1} = Q_l R_l.

    The product itself would be of numerical rank one after a few dozen layers: QR at each layer separates the
    directions before the strongest one dominates.

    Parameters
    ----------
    h
        (L, ..., n, n), from the first layer to the last.

    Returns
    -------
    Array
        (..., n), per layer, descending; the top one is 0 for stochastic matrices, −inf where singular.

    Examples
    --------
    >>> lyapunov_spectrum([[[2.0, 0.0], [0.0, 0.5]]] * 3).round(9).tolist()
    [0.693147181, -0.693147181]
    """
    xp, h = square(h, name="h", ndim=3)
    q, total = identity(xp, h), 0.0
    for layer in range(h.shape[0]):
        q, r = xp.linalg.qr(h[layer] @ q, mode="reduced")
        total = total + log(xp, xp.abs(xp.linalg.diagonal(r)))
    return xp.flip(xp.sort(total, axis=-1), axis=-1) / h.shape[0]
