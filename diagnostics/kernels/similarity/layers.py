"""How alike are all layers? CKA of every pair, exact at any common offset, from tiles of Gram matrices.

Shapes: ``...`` batch, ``N`` rows (the same tokens on both sides), ``d`` columns (features).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from array_api_compat import array_namespace, device

from diagnostics.kernels._arrays import Array, as_array, rows, scaled
from diagnostics.kernels.similarity.cka import cka_from_hsic, linear_hsic

# Numbers of one block of Gram rows over all layers: 32 MB in float32.
BLOCK = 8_000_000
# Unbiased HSIC is a difference; where it loses more than this factor, float32 tiles are not exact enough.
CANCELLATION = 8.0


def hsic_matrix(
    x: Array, *, unbiased: bool = True, y: Array | None = None, mask: Array | None = None
) -> Array:
    """HSIC of every layer with every other, (L, L): when unbiased, what minibatches may add up.

    Features are centred first, in float64. Then either blocks of the L Gram matrices (L N² d) or the
    cross-covariances (L² N d²) are multiplied, whichever costs less; those of float32 input in float32 and
    added in float64, or in float64 throughout where the unbiased difference cancels too much for that.

    Parameters
    ----------
    x
        Layers (L, N, d).
    unbiased
        HSIC₁, else ⟨K_c, L_c⟩/(N − 1)².
    y
        Other layers (M, N, d'), for an (L, M) table.
    mask
        Booleans (N,), False for tokens that do not count.

    Returns
    -------
    Array
        (L, L) or (L, M), float64, in squared units of both.

    Raises
    ------
    ValueError
        If shapes disagree or a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> hsic_matrix(np.array([[[1.0], [-1.0], [1.0], [-1.0]]])).round(9).tolist()
    [[2.666666667]]
    """
    return _hsic(x, y, mask, unbiased)[0]


def cka_matrix(
    x: Array, *, unbiased: bool = False, y: Array | None = None, mask: Array | None = None
) -> Array:
    """Linear CKA of every layer with every other, exact at any common offset.

    Parameters
    ----------
    x
        Layers (L, N, d) over the same tokens.
    unbiased
        Use Song's HSIC₁ (may be negative, not clipped), else the biased HSIC.
    y
        Other layers (M, N, d') over the same tokens, for an (L, M) table.
    mask
        Booleans (N,), False for tokens that do not count.

    Returns
    -------
    Array
        (L, L) or (L, M), float64; NaN for layers without variance. Source: Kornblith et al. 1905.00414.

    Raises
    ------
    ValueError
        If shapes disagree or a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> cka_matrix(np.stack([x, 3 * x[:, ::-1] + 1e4])).round(12).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    table, own_x, own_y = _hsic(x, y, mask, unbiased)
    return cka_from_hsic(table, own_x[:, None], own_y[None, :])


def _hsic(x: Array, y: Array | None, mask: Array | None, unbiased: bool) -> tuple[Array, Array, Array]:
    """The HSIC table (L, M) and the HSIC of each layer with itself, (L,) and (M,)."""
    if y is None:
        table, losing = _hsic_table(x, None, mask, unbiased, lean=True)
        if losing:
            table, _ = _hsic_table(x, None, mask, unbiased, lean=False)
        own = array_namespace(table).linalg.diagonal(table)
        return table, own, own
    own_x, own_y = _own_hsic(x, mask, unbiased), _own_hsic(y, mask, unbiased)
    return _hsic_table(x, y, mask, unbiased, lean=not unbiased)[0], own_x, own_y


def _own_hsic(x: Array, mask: Array | None, unbiased: bool) -> Array:
    """HSIC of each layer with itself, (L,), one layer at a time in float64."""
    found = []
    for layer in as_array(x):
        matrix = rows(layer, mask=mask, center=True)
        values, top = scaled(matrix)
        even = matrix._replace(values=values)
        value = linear_hsic(even, even, unbiased)
        value = value if unbiased else value / matrix.xp.clip(matrix.count - 1.0, min=1.0) ** 2
        found.append(value * top[0, 0] ** 4)
    return matrix.xp.stack(found)


class _Layers(NamedTuple):
    """Centred layers whose longest row has length 1."""

    values: Array  # (L, n, d), float32 where that is exact enough
    square_lengths: Array  # (L, n), float64, the diagonals of the Gram matrices
    scales: Array  # (L,), what they were divided by


def _hsic_table(
    x: Array, y: Array | None, mask: Array | None, unbiased: bool, *, lean: bool
) -> tuple[Array, bool]:
    """The HSIC table, and whether float32 tiles were used where they lose too much."""
    xp, a = _layers(x, mask, lean, "x")
    b = a if y is None else _layers(y, mask, lean, "y")[1]
    n = a.values.shape[1]
    if b.values.shape[1] != n:
        raise ValueError(
            f"x and y have {n} and {b.values.shape[1]} rows; expected the same tokens on both sides"
        )
    k, q = a.square_lengths, b.square_lengths
    shared = k @ xp.matrix_transpose(q)
    off = _distinct_products(xp, a.values, None if y is None else b.values, shared)
    scale = (a.scales**2)[:, None] * (b.scales**2)[None, :]
    if not unbiased:
        return (off + shared) / max(n - 1, 1) ** 2 * scale, False
    if n < 4:
        return xp.full_like(off, xp.nan), False
    link = xp.sum(k, axis=-1)[:, None] * xp.sum(q, axis=-1)[None, :] / ((n - 1) * (n - 2))
    total = off - 2.0 / (n - 2) * shared + link
    losing = y is None and a.values.dtype != xp.float64 and _cancels(xp, off + link, total)
    return total / (n * (n - 3)) * scale, losing


def _cancels(xp: Any, terms: Array, total: Array) -> bool:
    """Whether any layer's own HSIC₁ is much less than the terms it is the difference of."""
    return bool(xp.any(xp.linalg.diagonal(terms) > CANCELLATION * xp.linalg.diagonal(total)))


def _layers(x: Array, mask: Array | None, lean: bool, name: str) -> tuple[Any, _Layers]:
    """Layers (L, N, d) centred in float64 and kept in float32 if ``lean`` and no wider than that."""
    x = as_array(x)
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected layers (L, N, d), none of them empty")
    xp = array_namespace(x)
    lean = lean and x.dtype != xp.float64 and xp.isdtype(x.dtype, "real floating")
    kept, square_lengths, scales = None, [], []
    for index in range(x.shape[0]):  # one at a time: a single float64 copy is alive
        matrix = rows(x[index], mask=mask, center=True, name=name)
        values, top = scaled(matrix)
        square = xp.linalg.vecdot(values, values)
        length = xp.sqrt(xp.max(square))
        length = xp.where(length > 0, length, xp.ones_like(length))
        if matrix.mask is not None:
            values, square = values[matrix.mask], square[matrix.mask]
        if kept is None:
            dtype = xp.float32 if lean else xp.float64
            kept = xp.empty((x.shape[0], *values.shape), dtype=dtype, device=device(values))
        values /= length
        kept[index] = values
        square_lengths.append(square / length**2)
        scales.append(length * top[0, 0])
    return xp, _Layers(kept, xp.stack(square_lengths), xp.stack(scales))


def _distinct_products(xp: Any, a: Array, b: Array | None, shared: Array) -> Array:
    """Σ_{i≠j} K_ij L_ij of all pairs of layers, (L, M), float64; ``shared`` is Σ_i K_ii L_ii."""
    n, width = a.shape[1], max(a.shape[2], 1 if b is None else b.shape[2])
    if n * (width + a.shape[0]) > 1.1 * a.shape[0] * width**2:
        return _covariance_products(xp, a, b) - shared
    return _gram_products(xp, a, b)


def _gram_products(xp: Any, a: Array, b: Array | None) -> Array:
    """The same from blocks of rows of the Gram matrices on and right of the diagonal."""
    n = a.shape[1]
    block = max(1, min(n, BLOCK // (a.shape[0] * n)))
    total = 0.0
    for start in range(0, n, block):
        tile_a = _gram_tile(xp, a, start, block)
        tile_b = tile_a if b is None else _gram_tile(xp, b, start, block)
        products = tile_a @ xp.matrix_transpose(tile_b)  # a row of tokens at a time: short float32 sums
        total = total + 2.0 * xp.sum(xp.astype(products, xp.float64), axis=0)
    return total


def _gram_tile(xp: Any, x: Array, start: int, block: int) -> Array:
    """Rows ``start`` … of every layer's Gram matrix, upper part, as (rows, L, columns)."""
    tile = x[:, start : start + block] @ xp.matrix_transpose(x[:, start:])
    size = tile.shape[1]
    tile[:, :, :size] *= 0.5**0.5  # the square block on the diagonal holds every pair twice
    own = xp.arange(size, device=device(x))
    tile[:, own, own] = 0.0
    return xp.permute_dims(tile, (1, 0, 2))


def _covariance_products(xp: Any, a: Array, b: Array | None, rows_at_once: int = 1024) -> Array:
    """Σ_ij K_ij L_ij = ‖X_aᵀX_b‖_F² of all pairs, row blocks added in float64."""
    right = a if b is None else b
    table = xp.zeros((a.shape[0], right.shape[0]), dtype=xp.float64, device=device(a))
    for i in range(a.shape[0]):
        for j in range(i if b is None else 0, right.shape[0]):
            cross = 0.0
            for start in range(0, a.shape[1], rows_at_once):
                part = slice(start, start + rows_at_once)
                cross = cross + xp.astype(xp.matrix_transpose(a[i, part]) @ right[j, part], xp.float64)
            table[i, j] = xp.sum(cross * cross)
            if b is None:
                table[j, i] = table[i, j]
    return table


def minibatch_cka(batches_x: Iterable[Array], batches_y: Iterable[Array] | None = None) -> Array:
    """Minibatch CKA: HSIC₁ terms averaged over batches, then divided.

    Parameters
    ----------
    batches_x
        Batches (n_i, d), or stacks of layers (L, n_i, d) for an (L, L) table; 4 rows or more each.
    batches_y
        As many batches of the other side; the same side when ``None``.

    Returns
    -------
    Array
        () or (L, M), float64. It converges to unbiased CKA with more batches of any size.
        Source: Nguyen et al. 2010.15327.

    Raises
    ------
    ValueError
        If there is no batch, one has fewer than 4 rows, or the two sides differ in number.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(4, 16, 3))
    >>> round(float(minibatch_cka(list(x), list(2 * x + 1))), 12)
    1.0
    """
    sides_x = [as_array(batch) for batch in batches_x]
    sides_y = sides_x if batches_y is None else [as_array(batch) for batch in batches_y]
    if not sides_x or len(sides_x) != len(sides_y):
        raise ValueError(
            f"came {len(sides_x)} and {len(sides_y)} batches; expected as many on both sides, one at least"
        )
    total_xy: Any = 0.0
    total_xx: Any = 0.0
    total_yy: Any = 0.0
    for x, y in zip(sides_x, sides_y, strict=True):
        if x.shape[-2] < 4:
            raise ValueError(
                f"a batch has {x.shape[-2]} rows; HSIC₁ needs at least 4: drop it or join batches"
            )
        stack_x, stack_y = (side if side.ndim == 3 else side[None] for side in (x, y))
        xy, xx, yy = _hsic(stack_x, None if batches_y is None else stack_y, None, True)
        total_xy, total_xx, total_yy = total_xy + xy, total_xx + xx, total_yy + yy
    table = cka_from_hsic(total_xy, total_xx[:, None], total_yy[None, :])
    return table if sides_x[0].ndim == 3 else table[0, 0]
