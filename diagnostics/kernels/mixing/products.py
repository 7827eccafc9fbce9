"""What is the mapping from one depth to another? Products of mixing matrices at any depth, without overflow.

Shapes: ``L`` depth, ``...`` batch (tokens), ``B`` the batch flattened and put last, ``n`` streams. Composites put
the later layer on the LEFT: P_{a→b} = H_b … H_{a+1} H_a.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from depthscope.diagnostics.kernels._arrays import Array
from depthscope.diagnostics.kernels.mixing._matrices import (
    as_given,
    in_memory,
    rescaled,
    square_in_memory,
    unscaled,
)

# Up to this number of streams an einsum over the batch, last in memory, is faster than matmul, which calls BLAS once
# for each matrix. A heuristic of ours.
ENTRYWISE = 8


def stacked(h: Array) -> tuple[Any, Array, tuple[int, ...]]:
    """Namespace, matrices (L, ..., n, n) as contiguous (L, n, n, B), and the shape of the batch.

    Batch last: operations on one entry of all matrices then run over contiguous memory. Tensors on the CPU become
    numpy arrays.
    """
    xp, h = square_in_memory(h, name="h", ndim=3)
    flat = xp.reshape(h, (h.shape[0], -1, *h.shape[-2:]))
    return xp, contiguous(xp.permute_dims(flat, (0, 2, 3, 1))), tuple(h.shape[1:-2])


def contiguous(x: Array) -> Array:
    """The array in row-major order in memory: a copy where it is a transposed view."""
    return x.contiguous() if hasattr(x, "contiguous") else np.ascontiguousarray(x)


def unstacked(xp: Any, p: Array, shape: tuple[int, ...]) -> Array:
    """Batch-last matrices (..., n, n, B) in the batch shape and order of the caller."""
    lead = tuple(range(p.ndim - 3))
    last = p.ndim - 1
    moved = xp.permute_dims(p, (*lead, last, last - 2, last - 1))
    return xp.reshape(moved, (*p.shape[:-3], *shape, *p.shape[-3:-1]))


def multiply(xp: Any, a: Array, b: Array) -> Array:
    """Product of batch-last matrices (n, n, ...) and (n, m, ...)."""
    if a.shape[0] > ENTRYWISE:
        order, back = (*range(2, a.ndim), 0, 1), (a.ndim - 2, a.ndim - 1, *range(a.ndim - 2))
        return xp.permute_dims(xp.permute_dims(a, order) @ xp.permute_dims(b, order), back)
    return xp.einsum("ij...,jk...->ik...", a, b)


def _running(
    xp: Any, stack: Array, after: tuple[Array, Array] | None = None
) -> Iterator[tuple[Array, Array]]:
    """Layer by layer: the product so far (n, n, B) and its log scale."""
    product, log_scale = (None, xp.zeros_like(stack[0, 0, 0])) if after is None else after
    # Both factors are in the range before they are multiplied, so that the product cannot overflow.
    for layer in range(stack.shape[0]):
        new, log_scale = rescaled(xp, stack[layer], log_scale, dims=2)
        if product is not None:
            new, log_scale = rescaled(xp, multiply(xp, new, product), log_scale, dims=2)
        product = new
        yield product, log_scale


def _in_given_shape(h: Array, xp: Any, found: tuple[Array, Array], batch: tuple[int, ...], logs: bool) -> Any:
    """Products (..., n, n, B) and log scales (..., B) in the batch shape and library of ``h``; or values alone."""
    p, log_scale = unstacked(xp, found[0], batch), xp.reshape(found[1], (*found[1].shape[:-1], *batch))
    if not logs:
        return as_given(h, unscaled(xp, p, log_scale[..., None, None]))
    return as_given(h, p), as_given(h, log_scale)


def composite(h: Array, *, return_log_scale: bool = False) -> Any:
    """Composite mapping H_L … H_2 H_1 of a stack of mixing matrices.

    Parameters
    ----------
    h
        (L, ..., n, n), from the first layer to the last.
    return_log_scale
        Give (P, s) with the composite P · e^s, finite at any depth.

    Returns
    -------
    Array or tuple
        (..., n, n), infinite where a product exceeds float64; or with its log scale (...).

    Examples
    --------
    >>> composite([[[1.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]).tolist()
    [[0.0, 1.0], [1.0, 1.0]]
    """
    xp, stack, batch = stacked(h)
    *_, (product, log_scale) = _running(xp, stack)
    return _in_given_shape(h, xp, (product, log_scale), batch, return_log_scale)


def prefix_composites(
    h: Array, *, return_log_scale: bool = False, after: tuple[Array, Array] | None = None
) -> Any:
    """Composites from the input: entry l is H_l … H_1, the mapping of the streams up to depth l.

    Parameters
    ----------
    h
        (L, ..., n, n), from the first layer to the last.
    return_log_scale
        Give (P, s) with the composites P · e^s.
    after
        The composite (..., n, n) of the layers before these and its log scale (...): a deep stack is multiplied part by part.

    Returns
    -------
    Array or tuple
        (L, ..., n, n), or with its log scales (L, ...).

    Examples
    --------
    >>> prefix_composites([[[2.0]], [[3.0]]])[:, 0, 0].tolist()
    [2.0, 6.0]
    """
    xp, stack, batch = stacked(h)
    if after is not None:
        product, log_scale = (xp.asarray(in_memory(each)) for each in after)
        after = stacked(product[None])[1][0], xp.reshape(log_scale, (-1,))
    products, scales = xp.empty_like(stack), xp.empty_like(stack[:, 0, 0])
    for layer, (product, log_scale) in enumerate(_running(xp, stack, after)):
        products[layer], scales[layer] = product, log_scale
    return _in_given_shape(h, xp, (products, scales), batch, return_log_scale)
