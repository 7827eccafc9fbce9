"""Which paths does a depth kernel contain? Streams in use, hops back, and how much of each output is read."""

from typing import Any

from array_api_compat import device

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array, as_float64, triangle
from depthscope.diagnostics.kernels.mixing._matrices import log, square
from depthscope.diagnostics.kernels.rank import effective_rank_of


def effective_streams(m: Array, *, embedding: bool = False) -> Array:
    """Effective streams at each cut c: exp-entropy of the singular values of M[k ≥ c, j < c], a Hankel block.

    The block is all that later sublayers can read of earlier ones; its rank is at most n.

    Parameters
    ----------
    m
        Depth kernels (..., K, S).
    embedding
        Whether the first column is the embedding.

    Returns
    -------
    Array
        (..., cuts), for c = 1 … K − 1, from c = 0 with an embedding; NaN where nothing is read across.

    Examples
    --------
    >>> effective_streams([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]).round(9).tolist()
    [1.0, 1.0]
    """
    xp, m = as_float64(m, name="m", ndim=2)
    ahead = int(embedding)
    blocks = [m[..., c:, : c + ahead] for c in range(1 - ahead, m.shape[-2])]
    found = [effective_rank_of(xp.linalg.svdvals(block)) for block in blocks]
    return (
        xp.stack(found, axis=-1)
        if found
        else xp.zeros((*m.shape[:-2], 0), dtype=xp.float64, device=device(m))
    )


def streams_across(h_res: Array, h_pre: Array, h_post: Array) -> Array:
    """Effective streams at each cut from the connections themselves, at any depth and any gain.

    The Hankel block at a cut is R W, with the reads after it R (K − c, n) and the writes before it W (n, c). Its
    singular values are those of the n×n product of their triangular factors, each updated by one row at each
    connection: L factorisations of (n+1)×n in place of L of up to L×L. Factors are scaled to a largest entry of 1,
    which the entropy does not depend on.

    Parameters
    ----------
    h_res
        (L, ..., n, n), from the first connection to the last.
    h_pre, h_post
        (L, ..., n), read and write weights.

    Returns
    -------
    Array
        (..., L − 1), equal to `effective_streams` of the `depth_kernel`; NaN where nothing is read across.

    Raises
    ------
    InputError
        If shapes disagree.

    Examples
    --------
    >>> one = [[1.0]] * 3
    >>> streams_across([[[1.0]]] * 3, one, one).round(9).tolist()
    [1.0, 1.0]
    """
    xp, h = square(h_res, name="h_res", ndim=3)
    _, reads = as_float64(h_pre, name="h_pre")
    _, writes = as_float64(h_post, name="h_post")
    if reads.shape != h.shape[:-1] or writes.shape != h.shape[:-1]:
        raise InputError(
            f"h_pre and h_post have shapes {tuple(reads.shape)} and {tuple(writes.shape)}; expected "
            f"{tuple(h.shape[:-1])}, as h_res has"
        )
    depth = h.shape[0]
    # Writes go forward through H: as rows they are multiplied by its transpose. Reads are carried backward.
    before = _running_triangles(xp, [xp.matrix_transpose(h[c]) for c in range(depth)], list(writes))
    after = _running_triangles(
        xp, [h[c] for c in reversed(range(depth))], [reads[c] for c in reversed(range(depth))]
    )
    if depth < 2:
        return xp.zeros((*h.shape[1:-2], 0), dtype=xp.float64, device=device(h))
    blocks = [after[depth - 1 - cut] @ xp.matrix_transpose(before[cut - 1]) for cut in range(1, depth)]
    return xp.stack([effective_rank_of(xp.linalg.svdvals(block)) for block in blocks], axis=-1)


def _running_triangles(xp: Any, moves: list[Array], rows: list[Array]) -> list[Array]:
    """Triangles (..., n, n) of all rows so far, each multiplied by every later connection, up to a factor."""
    triangles, log_size = xp.zeros_like(moves[0]), xp.full_like(moves[0][..., 0, 0], -xp.inf)
    found = []
    for move, row in zip(moves, rows, strict=True):
        moved, log_factor = _normalised(xp, triangles @ move)
        new, log_new = _normalised(xp, row[..., None, :])
        log_moved = log_size + log_factor
        # The larger of the two has size 1, the other its share: nothing overflows, and what underflows is negligible.
        log_size = xp.where(log_moved > log_new, log_moved, log_new)
        finite = xp.where(xp.isfinite(log_size), log_size, xp.zeros_like(log_size))  # −∞ − −∞ would be NaN
        share_moved = xp.exp(log_moved - finite)[..., None, None]
        share_new = xp.exp(log_new - finite)[..., None, None]
        triangles = triangle(xp, xp.concat([moved * share_moved, new * share_new], axis=-2))
        found.append(triangles)
    return found


def _normalised(xp: Any, x: Array) -> tuple[Array, Array]:
    """Matrices divided by their largest entry, and its logarithm (...): −inf for zero."""
    top = xp.max(xp.abs(x), axis=(-2, -1))
    return x / xp.where(top > 0, top, xp.ones_like(top))[..., None, None], log(xp, top)
