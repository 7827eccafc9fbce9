"""What is the mapping between any two depths? Every product of consecutive mixing matrices, and the gains of each.

Shapes: ``L`` depth, ``...`` batch (tokens), ``B`` the batch flattened and put last, ``n`` streams.
"""

from collections.abc import Callable, Iterator
from typing import Any

from array_api_compat import device

from depthscope.diagnostics.kernels._arrays import Array
from depthscope.diagnostics.kernels.mixing._matrices import (
    LARGE,
    SMALL,
    as_given,
    in_memory,
    rescaled,
    unscaled,
)
from depthscope.diagnostics.kernels.mixing.gains import backward_gain, forward_gain
from depthscope.diagnostics.kernels.mixing.products import contiguous, multiply, stacked

# Entries of one block of products or vectors: half a MB of float64, which stays in the second-level cache of a core.
BLOCK = 65_536


def _columns(xp: Any, stack: Array) -> Iterator[tuple[int, Array, Array]]:
    """For each end b: products (n, n, b + 1, B) of every start, and log scales (b + 1, B)."""
    p, log_scale = stack[0][:, :, None][:, :, :0], xp.zeros_like(stack[0, 0, :0])
    for end in range(stack.shape[0]):
        layer, own = rescaled(xp, stack[end], xp.zeros_like(stack[0, 0, 0]), dims=2)
        if end:
            p, log_scale = rescaled(xp, multiply(xp, layer[:, :, None], p), log_scale + own, dims=2)
        p = xp.concat([p, layer[:, :, None]], axis=2)
        log_scale = xp.concat([log_scale, own[None]], axis=0)
        yield end, p, log_scale


def mix_on(xp: Any, layer: Array, vectors: Array, log_scale: Array) -> Array:
    """Multiply vectors (S, n, B) with log scales (S, B) by a layer (n, n, B), in place; returns their largest entries.

    A vector that leaves the range is divided by its largest entry, whose logarithm is added to its log scale.
    """
    matrix, own = rescaled(xp, layer, xp.zeros_like(layer[0, 0]), dims=2)
    if matrix is not layer:  # `rescaled` returns its input where nothing was to be done
        log_scale += own
    top = xp.empty_like(log_scale)
    for block in _blocks(vectors.shape):
        moved = xp.einsum("ijb,ajb->aib", matrix[..., block[1]], vectors[block[0], :, block[1]])
        vectors[block[0], :, block[1]] = moved
        top[block] = xp.max(xp.abs(moved), axis=1)
    if bool(xp.max(top) > LARGE) or bool(xp.min(top) < SMALL):
        out = ((top > LARGE) | (top < SMALL)) & (top > 0)
        shrink = xp.where(out, top, xp.ones_like(top))
        vectors /= shrink[:, None]
        log_scale += xp.log(shrink)
        top /= shrink
    return top


def _blocks(shape: tuple[int, int, int]) -> Iterator[tuple[slice, slice]]:
    """Slices of vectors and tokens of (S, n, B) that fit into the cache, over all tokens where possible."""
    count, n, total = shape
    width = min(total, BLOCK // n)
    height = max(1, BLOCK // (n * width))
    for token in range(0, total, width):
        for vector in range(0, count, height):
            yield slice(vector, vector + height), slice(token, token + width)


def pair_gains(h: Array, *, backward: bool = False) -> Iterator[tuple[int, Array, Array]]:
    """Amax gains of the all-pairs composites, one end at a time, without the products.

    Signed row sums P 1 are vectors, H_b (P_{a→b−1} 1), and so are column sums 1ᵀP from the last layer down: n²
    multiplications for a pair instead of n³.

    Parameters
    ----------
    h
        (L, ..., n, n), from the first layer to the last.
    backward
        Column sums in place of row sums.

    Yields
    ------
    tuple
        Forward: b, the gains (b + 1, ...) of P_{a→b} for every a ≤ b, and log scales of that shape. Backward: a,
        the gains (L − a, ...) of P_{a→b} for every b ≥ a, and log scales. A gain is value · e^scale.
        Source: mHC 2512.24880, Fig. 7.

    Examples
    --------
    >>> h = [[[1.0, 1.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]]]
    >>> [(b, gain.tolist()) for b, gain, scale in pair_gains(h)]
    [(0, [2.0]), (1, [4.0, 2.0])]
    >>> [(a, gain.tolist()) for a, gain, scale in pair_gains(h, backward=True)]
    [(1, [2.0]), (0, [2.0, 3.0])]
    """
    xp, stack, batch = stacked(h)
    depth, n, _, total = stack.shape
    sums = xp.ones((depth, n, total), dtype=xp.float64, device=device(stack))
    log_scale = xp.zeros_like(sums[:, 0])
    # Step by step the vectors of one more start are included; all others have had every layer from theirs on.
    for end in reversed(range(depth)) if backward else range(depth):
        layer = xp.permute_dims(stack[end], (1, 0, 2)) if backward else stack[end]
        reached = slice(end, None) if backward else slice(0, end + 1)
        gain = mix_on(xp, layer, sums[reached], log_scale[reached])
        scale = xp.asarray(log_scale[reached], copy=True)  # the next step overwrites it
        yield end, as_given(h, xp.reshape(gain, (-1, *batch))), as_given(h, xp.reshape(scale, (-1, *batch)))


def all_pairs(h: Array, *, reduce: Callable[[Array], Array] | None = None) -> Array:
    """All-pairs composites: entry [a, b] is P_{a→b} = H_b … H_a, both ends included, for a ≤ b.

    [a, a] is H_a itself. Entries a > b are no products of the stack: they are NaN. The empty product (the identity)
    is not in the table. With ``reduce`` the products are never in memory all at once.

    Parameters
    ----------
    h
        (L, ..., n, n), from the first layer to the last.
    reduce
        A number per matrix: a function (..., n, n) → (...) such as ``forward_gain``.

    Returns
    -------
    Array
        (L, L, ..., n, n), or (L, L, ...) of the values of ``reduce``; a product beyond float64 is infinite
        (``pair_gains`` gives log scales).

    Examples
    --------
    >>> all_pairs([[[2.0]], [[3.0]], [[5.0]]], reduce=forward_gain)[0].tolist()
    [2.0, 6.0, 30.0]
    """
    # The Amax gains are sums, which need no products of matrices.
    if reduce in (forward_gain, backward_gain):
        return _all_gains(h, backward=reduce is backward_gain)
    xp, stack, batch = stacked(h)
    depth, n, _, total = stack.shape
    block = max(1, BLOCK // (depth * n * n))
    table = None
    for start in range(0, total, block):
        part = contiguous(stack[..., start : start + block])
        for end, p, log_scale in _columns(xp, part):
            values = xp.permute_dims(unscaled(xp, p, log_scale), (2, 3, 0, 1))
            values = values if reduce is None else in_memory(reduce(as_given(h, values)))
            if table is None:  # its last dims and dtype are those of the first values
                shape = (depth, depth, total, *values.shape[2:])
                table = xp.full(shape, xp.nan, dtype=values.dtype, device=device(values))
            table[: end + 1, end, start : start + block] = values
    assert table is not None
    return as_given(h, xp.reshape(table, (depth, depth, *batch, *table.shape[3:])))


def _all_gains(h: Array, *, backward: bool) -> Array:
    """The gains of all pairs (L, L, ...), NaN where a > b."""
    xp, stack, batch = stacked(h)
    depth, total = stack.shape[0], stack.shape[-1]
    table = xp.full((depth, depth, total), xp.nan, dtype=xp.float64, device=device(stack))
    for end, gain, log_scale in pair_gains(h, backward=backward):
        values = xp.reshape(unscaled(xp, in_memory(gain), in_memory(log_scale)), (-1, total))
        if backward:
            table[end, end:] = values
        else:
            table[: end + 1, end] = values
    return as_given(h, xp.reshape(table, (depth, depth, *batch)))
