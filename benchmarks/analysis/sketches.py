"""How is CKA estimated in one pass over any number of tokens? By a signed sketch of the rows, plainly.

Shapes: ``...`` batch, ``N`` rows (the same tokens on both sides), ``d`` columns (features).
"""

from typing import Any

from array_api_compat import device

from depthscope.diagnostics.kernels._arrays import Array, as_float64, peak, rows
from depthscope.diagnostics.kernels.similarity.cka import cka_from_hsic


def _hashed(xp: Any, index: Array, seed: int) -> Array:
    """32 well-mixed bits of each index."""
    low = 0xFFFFFFFF
    h = ((index & low) ^ (index >> 32) ^ ((seed * 0x9E3779B1) & low)) & low
    # Multiply and shift; 32 bits times 27 stay inside int64, which torch has no unsigned kind of for all devices.
    for _ in range(3):
        h = ((h ^ (h >> 16)) * 0x45D9F3B) & low
    return h ^ (h >> 16)


def row_sketch(x: Array, index: Array, m: int, *, seed: int = 0) -> tuple[Array, Array]:
    """Signed row sketch: token i is added, with a random sign, to one of m buckets, the same at every depth.

    S_b = Σ_{i in b} s_i x_i. Additive over batches and ranks, and m d numbers however many tokens.

    Parameters
    ----------
    x
        States (..., N, d).
    index
        Global index of each token (N,), integers: they determine bucket and sign.
    m
        Number of buckets.
    seed
        Another seed, another sketch.

    Returns
    -------
    tuple
        S (..., m, d) and the signed counts (m,), Σ_{i in b} s_i, float64: add both over batches.

    Raises
    ------
    ValueError
        If ``index`` does not match the rows or ``m`` is below 2.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(6.0).reshape(3, 2)
    >>> total, _ = row_sketch(x, np.arange(3), 4)
    >>> parts = [row_sketch(x[i : i + 1], np.array([i]), 4)[0] for i in range(3)]
    >>> bool(np.array_equal(total, sum(parts)))
    True
    """
    matrix = rows(x)
    xp = matrix.xp
    index = xp.astype(xp.asarray(index, device=device(matrix.values)), xp.int64)
    # A single bucket has no two different ones to compare.
    if m < 2 or tuple(index.shape) != (matrix.values.shape[-2],):
        raise ValueError(
            f"index has shape {tuple(index.shape)} and m is {m}; expected one index for each of the "
            f"{matrix.values.shape[-2]} rows, and at least 2 buckets"
        )
    h = _hashed(xp, index, seed)
    # Sign and bucket from different bits, so that they are independent.
    bucket, sign = (h >> 1) % m, xp.astype(1 - 2 * (h & 1), xp.float64)
    chosen = xp.arange(m, device=device(matrix.values))[:, None] == bucket[None, :]
    signed = xp.astype(chosen, xp.float64) * sign
    return signed @ matrix.values, xp.sum(signed, axis=-1)


def cka_from_sketch(
    sketch: Array, signs: Array, mean: Array, *, diagonals: Array | None = None, count: int | None = None
) -> Array:
    """Unbiased linear CKA of all layers from row sketches: Gram products of the buckets without the diagonal.

    The mean is removed from the sketch afterwards, S − c μᵀ. Σ_{b≠c} P_bc P'_bc over buckets estimates
    (1 − 1/m) Σ_{i≠j} K_ij L_ij; the trace terms of HSIC₁, of relative order d/N, are included where
    ``diagonals`` is given.

    Parameters
    ----------
    sketch
        S (L, m, d), added over all batches.
    signs
        Signed counts (m,), added over all batches.
    mean
        Mean token of every layer (L, d).
    diagonals
        Σ_i ‖x_i − μ‖² of every layer (L,), for the trace term.
    count
        Number of tokens, needed with ``diagonals``.

    Returns
    -------
    Array
        (L, L), float64; NaN where an estimated denominator is not positive.

    Raises
    ------
    ValueError
        If shapes disagree, or only one of ``diagonals`` and ``count`` is given.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(1, 500, 3)) @ np.ones((2, 3, 3))
    >>> s, c = row_sketch(x, np.arange(500), 64)
    >>> cka_from_sketch(s, c, x.mean(1)).round(9).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    if (diagonals is None) != (count is None):
        raise ValueError("got only one of diagonals and count; expected both or neither")
    xp, sketch = as_float64(sketch, name="sketch", ndim=3)
    centered = sketch - signs[:, None] * mean[:, None, :]
    # Scaled by the largest entry, since products of products follow.
    centered = centered / (scale := peak(xp, centered))
    buckets = xp.reshape(
        _without_diagonal(xp, centered @ xp.matrix_transpose(centered)), (sketch.shape[0], -1)
    )
    total = buckets @ buckets.T / (1.0 - 1.0 / sketch.shape[1])
    if diagonals is not None and count is not None:
        trace = diagonals / scale[:, 0, 0] ** 2
        total = total + trace[:, None] * trace[None, :] / ((count - 1) * (count - 2))
    own = xp.linalg.diagonal(total)
    return cka_from_hsic(total, own[:, None], own[None, :])


def _without_diagonal(xp: Any, square: Array) -> Array:
    """Square matrices with their diagonal set to zero."""
    return square * (1.0 - xp.eye(square.shape[-1], dtype=xp.float64, device=device(square)))
