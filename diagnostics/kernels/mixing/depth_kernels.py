"""How much of an earlier output does a sublayer read? The depth kernel, HC's dense connection matrix."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from array_api_compat import device

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array, as_float64
from depthscope.diagnostics.kernels.mixing._matrices import (
    LARGE,
    SMALL,
    as_given,
    in_memory,
    rescaled,
    unscaled,
)
from depthscope.diagnostics.kernels.mixing.products import contiguous, stacked

# Entries of one block of vectors: half a MB of float64, which stays in the second-level cache of a core.
BLOCK = 65_536


def depth_kernel(
    h_res: Array,
    h_pre: Array,
    h_post: Array,
    *,
    embedding: Array | None = None,
    head: Array | None = None,
    applied_to: Sequence[int] | None = None,
    reads_from: Sequence[int] | None = None,
) -> Array:
    """Depth kernel M_kj = H_pre,k (∏_{t=j+1}^{k−1} H_res,t) H_postᵀ_j: how much of output j sublayer k reads.

    Unchanged by a change of the stream basis, unlike the spectra of H_res. Strictly lower triangular.

    Parameters
    ----------
    h_res
        (L, ..., n, n).
    h_pre, h_post
        (L, ..., n), read and write weights.
    embedding
        (..., n), weights by which the embedding enters the streams (ones where it is copied): adds a first
        column, the embedding read through ∏_{t<k} H_res,t.
    head
        (..., n), weights by which the head reads the streams: adds a last row.
    applied_to
        The state, numbered from 0, that each sublayer makes the next one of; by default its own number. Sublayers of
        one state are parallel branches: they share its H_res, of which the first one's is taken.
    reads_from
        The state that each sublayer reads; by default the one that it is applied to, an earlier one for a read that was
        made by a previous sublayer.

    Returns
    -------
    Array
        (..., K, S): readers by sources, K = L or L + 1 with a head, S = L or L + 1 with an embedding.
        Source: Zhu et al. 2409.19606, Fig. 7 (dense connection matrix).

    Raises
    ------
    InputError
        If shapes disagree, or a sublayer reads a state later than its own.

    Examples
    --------
    A plain residual network: every sublayer reads all earlier outputs in full.

    >>> one = [[1.0]] * 3
    >>> depth_kernel([[[1.0]]] * 3, one, one).tolist()
    [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]

    The first two in parallel, as in GPT-J: neither reads the other.

    >>> depth_kernel([[[1.0]]] * 3, one, one, applied_to=[0, 0, 1]).tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    """
    xp, stack, batch = stacked(h_res)
    reads = _weights(xp, stack, batch, h_pre, "h_pre")
    writes = _weights(xp, stack, batch, h_post, "h_post")
    # Column by column would take L² products: instead one vector for each source, its writes carried through every
    # H_res so far, goes through depth once. Row k of the kernel is what reader k reads of them.
    ahead = 0 if embedding is None else 1
    depth, n, _, total = stack.shape
    steps, read_at = _order(depth, applied_to, reads_from)
    vectors = xp.zeros((depth + ahead, n, total), dtype=xp.float64, device=device(stack))
    log_scale = xp.zeros_like(vectors[:, 0])
    if embedding is not None:
        vectors[0] = _edge(xp, stack, batch, embedding, "embedding")
    readers = [*reads] if head is None else [*reads, _edge(xp, stack, batch, head, "head")]
    kernel = xp.zeros((len(readers), depth + ahead, total), dtype=xp.float64, device=device(stack))
    # One more state than steps: the head reads the last.
    for state, sublayers in enumerate([*steps, range(depth, len(readers))]):
        known = slice(0, sublayers.start + ahead)
        for k in (*read_at.get(state, ()), *(sublayers if sublayers.start == depth else ())):
            kernel[k, known] = unscaled(
                xp, xp.einsum("ib,aib->ab", readers[k], vectors[known]), log_scale[known]
            )
        if sublayers.start < depth:  # the head is no sublayer: it mixes and writes nothing
            if sublayers.start + ahead:
                mix_on(xp, stack[sublayers.start], vectors[known], log_scale[known])
            for k in sublayers:
                vectors[k + ahead] = writes[k]
    moved = xp.permute_dims(kernel, (2, 0, 1))
    return as_given(h_res, xp.reshape(moved, (*batch, *kernel.shape[:2])))


def _order(
    depth: int, applied_to: Sequence[int] | None, reads_from: Sequence[int] | None
) -> tuple[list[range], dict[int, list[int]]]:
    """The sublayers of each state in order, and by state those that read it."""
    at = list(range(depth)) if applied_to is None else [int(state) for state in applied_to]
    read = at if reads_from is None else [int(state) for state in reads_from]
    in_order = len(at) == depth and at[:1] == [0] and all(b - a in (0, 1) for a, b in pairwise(at))
    if not in_order:
        raise InputError(
            f"applied_to is {at}; expected {depth} states from 0 on, each the last one or the next"
        )
    if len(read) != depth or any(not 0 <= r <= a for r, a in zip(read, at, strict=False)):
        raise InputError(
            f"reads_from is {read}; expected {depth} states, none later than those of applied_to, {at}"
        )
    starts = [k for k in range(depth) if k == 0 or at[k] != at[k - 1]]
    steps = [range(start, end) for start, end in pairwise([*starts, depth])]
    read_at: dict[int, list[int]] = {}
    for k, state in enumerate(read):
        read_at.setdefault(state, []).append(k)
    return steps, read_at


def _weights(xp: Any, stack: Array, batch: tuple[int, ...], weights: Array, name: str) -> Array:
    """Read or write weights (L, ..., n) as (L, n, B)."""
    _, weights = as_float64(weights, name=name)
    expected = (stack.shape[0], *batch, stack.shape[1])
    if tuple(weights.shape) != expected:
        raise InputError(f"{name} has shape {tuple(weights.shape)}; expected {expected}, as h_res has")
    flat = xp.reshape(in_memory(weights), (stack.shape[0], -1, stack.shape[1]))
    return contiguous(xp.permute_dims(flat, (0, 2, 1)))


def _edge(xp: Any, stack: Array, batch: tuple[int, ...], weights: Array, name: str) -> Array:
    """Weights of the embedding or the head, (..., n) broadcast over the batch to (n, B)."""
    _, weights = as_float64(weights, name=name)
    expected = (*batch, stack.shape[1])
    try:
        full = xp.broadcast_to(xp.asarray(in_memory(weights), device=device(stack)), expected)
    except (ValueError, RuntimeError):
        raise InputError(f"{name} has shape {tuple(weights.shape)}; expected (..., n) = {expected}") from None
    return xp.permute_dims(xp.reshape(full, (-1, stack.shape[1])), (1, 0))


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
