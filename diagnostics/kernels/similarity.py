"""How alike two representations of the same tokens are, and how alike unrelated ones would look.

Shapes: ``...`` batch, ``L`` layers, ``N`` rows (the same tokens on both sides), ``d`` columns (features).
"""

from collections.abc import Callable, Iterable
from typing import Any

from array_api_compat import array_namespace, device

from diagnostics.kernels._arrays import (
    Array,
    Rows,
    as_array,
    as_float64,
    peak,
    ratio,
    rows,
    selected,
    unit_rows,
)

# Numbers of one block of Gram rows over all layers: 32 MB in float32.
BLOCK = 8_000_000
# Unbiased HSIC is a difference; where it loses more than this factor, float32 tiles are not exact enough.
CANCELLATION = 8.0


def _pair(x: Array, y: Array, mask: Array | None, *, center: bool) -> tuple[Rows, Rows]:
    """Two batches of matrices with the same batch and rows."""
    a = rows(x, mask=mask, center=center)
    b = rows(y, mask=mask, center=center, name="y")
    if a.values.shape[:-1] != b.values.shape[:-1]:
        raise ValueError(
            f"x and y have shapes {tuple(a.values.shape)} and {tuple(b.values.shape)}; expected equal "
            "batch and rows (..., N); widths may differ"
        )
    return a, b


def _each(
    of: Callable[[Any, Array, Array], Array], x: Array, y: Array, mask: Array | None, *, center: bool = True
) -> Array:
    """A number for each pair of matrices of a batch, over the rows that count."""
    a, b = _pair(x, y, mask, center=center)
    found = [of(a.xp, left, right) for left, right in zip(selected(a), selected(b), strict=True)]
    return a.xp.reshape(a.xp.stack(found), a.values.shape[:-2])


# CKA


def _inner(xp: Any, x: Array, y: Array) -> Array:
    """⟨XXᵀ, YYᵀ⟩ by the cheaper of the Gram matrices and the cross-covariance, (...)."""
    n, dx, dy = x.shape[-2], x.shape[-1], y.shape[-1]
    xt, yt = xp.matrix_transpose(x), xp.matrix_transpose(y)
    if n * (dx + dy) < dx * dy:
        return xp.sum((x @ xt) * (y @ yt), axis=(-2, -1))
    return xp.sum((xt @ y) ** 2, axis=(-2, -1))


def _square_lengths(xp: Any, x: Array) -> Array:
    """Squared row lengths, the diagonal of XXᵀ, (..., N)."""
    return xp.sum(x * x, axis=-1)


def _unbiased(xp: Any, inner: Array, k: Array, q: Array, n: Array) -> Array:
    """HSIC₁ of centred features from ⟨K, L⟩, the diagonals k and q (..., N) and the number of rows.

    With K1 = 0 Song's three terms are ⟨K, L⟩ − n/(n−2) Σ k_i q_i + tr K tr L /((n−1)(n−2)), over n(n−3).
    """
    enough = n > 3
    n = xp.where(enough, n, 4.0 * xp.ones_like(n))
    traces = xp.sum(k, axis=-1) * xp.sum(q, axis=-1)
    total = inner - n / (n - 2.0) * xp.sum(k * q, axis=-1) + traces / ((n - 1.0) * (n - 2.0))
    return xp.where(enough, total / (n * (n - 3.0)), xp.full_like(total, xp.nan))


def _linear_hsic(a: Rows, b: Rows, unbiased: bool) -> Array:
    """HSIC of centred features, scaled by a common factor that CKA divides out; (...)."""
    xp = a.xp
    inner = _inner(xp, a.values, b.values)
    if not unbiased:
        return inner
    return _unbiased(xp, inner, _square_lengths(xp, a.values), _square_lengths(xp, b.values), a.count)


def cka_from_hsic(xy: Array, xx: Array, yy: Array) -> Array:
    """CKA from HSIC terms: HSIC(x, y) / √(HSIC(x, x) HSIC(y, y)), nothing clipped or padded.

    Parameters
    ----------
    xy, xx, yy
        HSIC values of any one estimator, or their sums over minibatches, broadcastable.

    Returns
    -------
    Array
        The ratio; NaN where a denominator is not positive.

    Raises
    ------
    ValueError
        If ``xy`` holds infinities.

    Examples
    --------
    >>> float(cka_from_hsic(1.0, 4.0, 1.0))
    0.5
    """
    xy, xx, yy = as_array(xy), as_array(xx), as_array(yy)
    xp = array_namespace(xy)
    defined = (xx > 0) & (yy > 0)
    norm = xp.sqrt(xp.where(xx > 0, xx, xp.ones_like(xx))) * xp.sqrt(xp.where(yy > 0, yy, xp.ones_like(yy)))
    if bool(xp.any(xp.isinf(xy))):
        raise ValueError("xy holds infinite HSIC values; expected finite ones: rescale the features")
    return xp.where(defined, xy / norm, xp.full_like(xy / norm, xp.nan))


def linear_cka(x: Array, y: Array, *, unbiased: bool = False, mask: Array | None = None) -> Array:
    """Linear CKA: ‖YᵀX‖_F² / (‖XᵀX‖_F ‖YᵀY‖_F) of centred features, or the same ratio of unbiased HSIC₁.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows.
    unbiased
        Use Song's HSIC₁: about 0 for unrelated data where the biased value is ``cka_null``; may be negative.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...); biased values lie in [0, 1]. NaN where a side has no variance (all rows equal) or, unbiased,
        fewer than 4 rows. Source: Kornblith et al. 1905.00414; Song et al. 2012.

    Raises
    ------
    ValueError
        If rows do not match or a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> float(linear_cka(x, x[:, :1]).round(12)) == round(0.5**0.5, 12)
    True
    """
    a, b = _pair(x, y, mask, center=True)
    a = a._replace(values=a.values / peak(a.xp, a.values))
    b = b._replace(values=b.values / peak(b.xp, b.values))
    return cka_from_hsic(
        _linear_hsic(a, b, unbiased), _linear_hsic(a, a, unbiased), _linear_hsic(b, b, unbiased)
    )


def linear_hsic1(x: Array, y: Array, *, mask: Array | None = None) -> Array:
    """Unbiased HSIC₁ of linear kernels, in squared units of both: what minibatch CKA adds up.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), may be negative; NaN below 4 rows. Source: Song et al. 2012, Eq. 5.

    Raises
    ------
    ValueError
        If rows do not match or a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0], [-1.0], [1.0], [-1.0]])
    >>> round(float(linear_hsic1(x, x)), 9), round(float(hsic1(x @ x.T, x @ x.T)), 9)
    (2.666666667, 2.666666667)
    """
    a, b = _pair(x, y, mask, center=True)
    return _linear_hsic(a, b, True)


def hsic1(k: Array, q: Array) -> Array:
    """Unbiased HSIC₁ of two kernel matrices K, L with their diagonals set to zero.

    [tr(K̃L̃) + 1ᵀK̃1 1ᵀL̃1/((n−1)(n−2)) − 2/(n−2) 1ᵀK̃L̃1] / (n(n−3)).

    Parameters
    ----------
    k, q
        Kernel matrices (..., n, n).

    Returns
    -------
    Array
        (...), may be negative; NaN below 4 rows. Source: Song et al. 2012, Eq. 5.

    Raises
    ------
    ValueError
        If the shapes are not square and equal, or values are not finite.

    Examples
    --------
    >>> import numpy as np
    >>> round(abs(float(hsic1(np.ones((5, 5)), np.ones((5, 5))))), 12)
    0.0
    """
    xp, k = as_float64(k, name="k", ndim=2)
    _, q = as_float64(q, name="q", ndim=2)
    n = k.shape[-1]
    if k.shape != q.shape or k.shape[-2] != n:
        raise ValueError(
            f"k and q have shapes {tuple(k.shape)} and {tuple(q.shape)}; expected equal (..., n, n)"
        )
    if n < 4:
        return xp.full_like(k[..., 0, 0], xp.nan)
    off = 1.0 - xp.eye(n, dtype=xp.float64, device=device(k))
    k, q = k * off, q * off
    product = xp.sum(k * xp.matrix_transpose(q), axis=(-2, -1))
    sums = xp.sum(k, axis=(-2, -1)) * xp.sum(q, axis=(-2, -1)) / ((n - 1) * (n - 2))
    crossed = xp.sum(xp.sum(k, axis=-2) * xp.sum(q, axis=-1), axis=-1)
    return (product + sums - 2.0 / (n - 2) * crossed) / (n * (n - 3))


# CKA between all layers


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
        top = peak(matrix.xp, matrix.values)
        scaled = matrix._replace(values=matrix.values / top)
        value = _linear_hsic(scaled, scaled, unbiased)
        value = value if unbiased else value / matrix.xp.clip(matrix.count - 1.0, min=1.0) ** 2
        found.append(value * top[0, 0] ** 4)
    return matrix.xp.stack(found)


def _hsic_table(
    x: Array, y: Array | None, mask: Array | None, unbiased: bool, *, lean: bool
) -> tuple[Array, bool]:
    """The HSIC table, and whether float32 tiles were used where they lose too much."""
    xp, a, scale_a, lean_a = _layers(x, mask, lean, "x")
    _, b, scale_b, lean_b = (xp, a, scale_a, lean_a) if y is None else _layers(y, mask, lean, "y")
    n = a.shape[1]
    if b.shape[1] != n:
        raise ValueError(f"x and y have {n} and {b.shape[1]} rows; expected the same tokens on both sides")
    k, q = _diagonals(xp, a), _diagonals(xp, b)
    shared = k @ xp.matrix_transpose(q)
    off = _distinct_products(xp, a, None if y is None else b, shared)
    scale = (scale_a**2)[:, None] * (scale_b**2)[None, :]
    if not unbiased:
        return (off + shared) / max(n - 1, 1) ** 2 * scale, False
    if n < 4:
        return xp.full_like(off, xp.nan), False
    link = xp.sum(k, axis=-1)[:, None] * xp.sum(q, axis=-1)[None, :] / ((n - 1) * (n - 2))
    total = off - 2.0 / (n - 2) * shared + link
    losing = (lean_a or lean_b) and y is None and _cancels(xp, off + link, total)
    return total / (n * (n - 3)) * scale, losing


def _cancels(xp: Any, terms: Array, total: Array) -> bool:
    """Whether any layer's own HSIC₁ is much less than the terms it is the difference of."""
    return bool(xp.any(xp.linalg.diagonal(terms) > CANCELLATION * xp.linalg.diagonal(total)))


def _layers(x: Array, mask: Array | None, lean: bool, name: str) -> tuple[Any, Array, Array, bool]:
    """Centred layers (L, n, d) with a largest entry of 1; their scales (L,); whether they are float32."""
    x = as_array(x)
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected layers (L, N, d), none of them empty")
    xp = array_namespace(x)
    lean = lean and x.dtype != xp.float64 and xp.isdtype(x.dtype, "real floating")
    dtype = xp.float32 if lean else xp.float64
    layers, scales = [], []
    for layer in x:  # one at a time: a single float64 copy is alive
        matrix = rows(layer, mask=mask, center=True, name=name)
        values = selected(matrix)[0]
        top = (
            peak(xp, values) if values.shape[0] else xp.ones((1, 1), dtype=xp.float64, device=device(values))
        )
        layers.append(xp.astype(values / top, dtype))
        scales.append(top[0, 0])
    return xp, xp.stack(layers), xp.stack(scales), lean


def _diagonals(xp: Any, x: Array) -> Array:
    """Squared row lengths (L, n) in float64."""
    return xp.stack([xp.sum(xp.astype(layer, xp.float64) ** 2, axis=-1) for layer in x])


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


def cka_null(n: int, d_x: int, d_y: int | None = None) -> float:
    """Null expectation of biased CKA: √(d_x d_y / ((n + d_x)(n + d_y))) for independent Gaussian data.

    Parameters
    ----------
    n
        Rows.
    d_x, d_y
        Widths; equal when only one is given.

    Returns
    -------
    float
        The ratio of expectations, n counting before centring; unbiased CKA has 0.

    Raises
    ------
    ValueError
        If a size is below 1.

    Examples
    --------
    >>> round(cka_null(100, 1000), 3)
    0.909
    """
    d_y = d_x if d_y is None else d_y
    if min(n, d_x, d_y) < 1:
        raise ValueError(f"n, d_x, d_y is {n}, {d_x}, {d_y}; expected at least 1 each")
    # E tr(W²) = (n−1) d (n + d) for W of n − 1 centred rows, E⟨K, L⟩ = (n−1) d_x d_y
    return float((d_x * d_y / ((n + d_x) * (n + d_y))) ** 0.5)


def _square_distances(xp: Any, x: Array) -> Array:
    """Squared distances between the rows of a centred matrix (N, d), zero on the diagonal."""
    square = _square_lengths(xp, x)
    apart = square[:, None] + square[None, :] - 2.0 * (x @ x.T)
    off = 1.0 - xp.eye(x.shape[0], dtype=xp.float64, device=device(x))
    return xp.clip(apart, min=0.0) * off


def _upper(xp: Any, square: Array) -> Array:
    """Entries above the diagonal of (n, n), flat."""
    n = square.shape[0]
    index = xp.arange(n, device=device(square))
    return square[index[:, None] < index[None, :]]


def _median(xp: Any, values: Array) -> Array:
    """The median of flat values."""
    ordered, n = xp.sort(values), values.shape[0]
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2.0


def rbf_cka(
    x: Array, y: Array, *, fraction: float = 0.5, unbiased: bool = False, mask: Array | None = None
) -> Array:
    """RBF CKA: the kernel exp(−‖x_i − x_j‖²/(2σ²)), σ a fraction of the median distance of each side.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows.
    fraction
        σ as a multiple of the median distance between different rows.
    unbiased
        Use Song's HSIC₁.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...); NaN where the median distance of a side is zero. Source: Kornblith et al. 1905.00414.

    Raises
    ------
    ValueError
        If ``fraction`` is not positive, rows do not match or hold NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(20, 3))
    >>> round(float(rbf_cka(x, 5 * x[:, ::-1] + 1)), 12)  # isometries and scale change nothing
    1.0
    """
    if not fraction > 0:
        raise ValueError(f"fraction is {fraction}; expected a positive multiple of the median distance")

    def of(xp: Any, left: Array, right: Array) -> Array:
        if left.shape[0] < 2:
            return xp.asarray(xp.nan, dtype=xp.float64, device=device(left))
        k, q = (_rbf(xp, side, fraction) for side in (left, right))
        hsic = hsic1 if unbiased else _biased_hsic
        return cka_from_hsic(hsic(k, q), hsic(k, k), hsic(q, q))

    return _each(of, x, y, mask)


def _rbf(xp: Any, x: Array, fraction: float) -> Array:
    """The RBF kernel; all ones, and so without variance, where the median distance is zero."""
    square = _square_distances(xp, x / peak(xp, x))
    width = fraction * _median(xp, xp.sqrt(_upper(xp, square)))
    safe = xp.where(width > 0, width, xp.ones_like(width))
    return xp.where(width > 0, xp.exp(-square / (2.0 * safe**2)), xp.ones_like(square))


def _biased_hsic(k: Array, q: Array) -> Array:
    """⟨K_c, L_c⟩ of doubly centred kernels."""
    xp = array_namespace(k)
    centered = [
        m - xp.mean(m, axis=-1, keepdims=True) - xp.mean(m, axis=-2, keepdims=True) + xp.mean(m)
        for m in (k, q)
    ]
    return xp.sum(centered[0] * centered[1])


# Canonical correlations and shapes


def _basis(xp: Any, x: Array, energy: float) -> tuple[Array, Array]:
    """Left singular vectors that hold a share ``energy`` of the variance, and their singular values."""
    u, s, _ = xp.linalg.svd(x, full_matrices=False)
    kept = s > s[0] * max(x.shape) * xp.finfo(xp.float64).eps
    if energy < 1:
        before = xp.cumulative_sum(s * s) - s * s
        kept = kept & (before < energy * xp.sum(s * s))
    return u[:, kept], s[kept]


def svcca(x: Array, y: Array, *, energy: float = 0.99, mask: Array | None = None) -> Array:
    """SVCCA: mean canonical correlation of the leading singular directions of each side.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows.
    energy
        Share of the variance that the kept directions hold.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), between 0 and 1, over the smaller number of directions; NaN for a side without variance.
        Source: Raghu et al. 1706.05806.

    Raises
    ------
    ValueError
        If a side keeps N − 1 directions or more (CCA is then 1 by construction), or rows do not match.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(50, 3))
    >>> round(float(svcca(x, x @ np.diag([1.0, 2.0, 3.0]))), 9)
    1.0
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}; expected a share of the variance, above 0 and at most 1")

    def of(xp: Any, left: Array, right: Array) -> Array:
        _require_rows(left.shape[0], 1)
        (u, _), (w, _) = _basis(xp, left, energy), _basis(xp, right, energy)
        _require_rows(left.shape[0] - 1, max(u.shape[1], w.shape[1]))
        if min(u.shape[1], w.shape[1]) == 0:
            return xp.asarray(xp.nan, dtype=xp.float64, device=device(left))
        return xp.mean(xp.clip(xp.linalg.svdvals(u.T @ w), max=1.0))

    return _each(of, x, y, mask)


def pwcca(x: Array, y: Array, *, mask: Array | None = None) -> Array:
    """PWCCA: canonical correlations weighted by how much of x each canonical direction accounts for.

    Σ_i α_i ρ_i / Σ_i α_i with α_i = Σ_j |⟨h_i, x_j⟩|, h_i the canonical variates and x_j the features of x;
    not symmetric.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), between 0 and 1; NaN for a side without variance. Source: Morcos et al. 1806.05759.

    Raises
    ------
    ValueError
        If there are no more rows than features (CCA is then 1 by construction), or rows do not match.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(50, 3))
    >>> round(float(pwcca(x, x @ np.diag([1.0, 2.0, 3.0]))), 9)
    1.0
    """

    def of(xp: Any, left: Array, right: Array) -> Array:
        _require_rows(left.shape[0], max(left.shape[1], right.shape[1]))
        (u, _), (w, _) = _basis(xp, left, 1.0), _basis(xp, right, 1.0)
        if min(u.shape[1], w.shape[1]) == 0:
            return xp.asarray(xp.nan, dtype=xp.float64, device=device(left))
        rotation, correlation, _ = xp.linalg.svd(u.T @ w, full_matrices=False)
        weight = xp.sum(xp.abs((u @ rotation).T @ left), axis=-1)
        return xp.sum(weight * xp.clip(correlation, max=1.0)) / xp.sum(weight)

    return _each(of, x, y, mask)


def _require_rows(n: int, p: int) -> None:
    """Refuse canonical correlations without spare rows."""
    if n <= p:
        raise ValueError(
            f"came {n} independent rows for {p} directions; expected more rows, for with n ≤ p "
            "canonical correlations are 1 by construction: give more tokens or fewer directions"
        )


def procrustes(x: Array, y: Array, *, squared: bool = False, mask: Array | None = None) -> Array:
    """Procrustes shape distance: the angle arccos ‖XᵀY‖_* of centred sides at ‖·‖_F = 1.

    Computed from the residual of the best rotation, 2 arcsin(‖X − YQ‖_F/2), right down to 1e-15.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows; the narrower one gains zero columns.
    squared
        Give the squared Euclidean distance min_Q ‖X − YQ‖_F² = 2 − 2 cos instead of the angle.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), angle in radians between 0 and π/2, or its square form between 0 and 2; NaN for a side
        without variance. Source: Williams et al. 2110.14739 (netrep).

    Raises
    ------
    ValueError
        If rows do not match or hold NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    >>> y = np.array([[1.0, 0.0], [1.0, 0.0], [-2.0, 0.0]])
    >>> round(float(procrustes(x, y)), 9) == round(np.pi / 2, 9)
    True
    """

    def of(xp: Any, left: Array, right: Array) -> Array:
        residual = _rotation_residual(xp, left, right)
        return residual**2 if squared else 2.0 * xp.asin(xp.clip(residual / 2.0, max=1.0))

    return _each(of, x, y, mask)


def _rotation_residual(xp: Any, x: Array, y: Array) -> Array:
    """min_Q ‖X − YQ‖_F of centred matrices at unit norm, NaN where one is zero."""
    a, b = (_compact(xp, side, max(x.shape[1], y.shape[1])) for side in (x, y))
    size_a, size_b = xp.linalg.vector_norm(a), xp.linalg.vector_norm(b)
    if bool((size_a == 0) | (size_b == 0)):
        return size_a * xp.nan
    a, b = a / size_a, b / size_b
    u, _, vt = xp.linalg.svd(b.T @ a, full_matrices=False)
    return xp.linalg.vector_norm(a - b @ (u @ vt))


def _compact(xp: Any, x: Array, width: int) -> Array:
    """The same shape in as few columns as two sides need: rotated to min(N, width) ones, zeros added."""
    x = x / peak(xp, x)
    if x.shape[0] < x.shape[1]:
        x = xp.linalg.qr(x.T, mode="reduced")[1].T
    missing = min(x.shape[0], width) - x.shape[1]
    if missing <= 0:
        return x
    return xp.concat([x, xp.zeros((x.shape[0], missing), dtype=xp.float64, device=device(x))], axis=1)


# Neighbours and distances


def rsa(
    x: Array, y: Array, *, metric: str = "correlation", compare: str = "spearman", mask: Array | None = None
) -> Array:
    """RSA: correlation between the dissimilarities of all pairs of rows on the two sides.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows.
    metric
        ``"correlation"`` (1 − Pearson over features), ``"cosine"`` or ``"euclidean"``.
    compare
        ``"spearman"`` (ties get mean ranks) or ``"pearson"``.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), between −1 and 1; NaN when all dissimilarities of a side are equal or a row has no
        direction. Source: Kriegeskorte et al. 2008.

    Raises
    ------
    ValueError
        If ``metric`` or ``compare`` is unknown, or rows do not match.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[0.0], [1.0], [3.0]])
    >>> float(rsa(x, 2 * x, metric="euclidean").round(12))
    1.0
    """
    if metric not in ("correlation", "cosine", "euclidean") or compare not in ("spearman", "pearson"):
        raise ValueError(
            f"metric is {metric!r} and compare {compare!r}; expected 'correlation', 'cosine' or 'euclidean', "
            "and 'spearman' or 'pearson'"
        )

    def of(xp: Any, left: Array, right: Array) -> Array:
        if left.shape[0] < 3:
            return xp.asarray(xp.nan, dtype=xp.float64, device=device(left))
        a, b = (_dissimilarities(xp, side, metric) for side in (left, right))
        if compare == "spearman":
            a, b = _ranks(xp, a), _ranks(xp, b)
        return _pearson(xp, a, b)

    return _each(of, x, y, mask, center=False)


def _dissimilarities(xp: Any, x: Array, metric: str) -> Array:
    """Dissimilarities of all pairs of rows, flat; NaN where a row has no direction."""
    if metric == "euclidean":
        return xp.sqrt(_upper(xp, _square_distances(xp, rows(x, center=True).values)))
    if metric == "correlation":
        x = xp.matrix_transpose(rows(xp.matrix_transpose(x), center=True).values)
    unit, length = unit_rows(xp, x)
    unit = xp.where((length > 0)[:, None], unit, xp.full_like(unit, xp.nan))
    return _upper(xp, 1.0 - unit @ unit.T)


def _ranks(xp: Any, values: Array) -> Array:
    """Ranks from 1, the mean rank for ties; NaN anywhere leaves NaN."""
    if bool(xp.any(xp.isnan(values))):
        return values
    ordered = xp.sort(values)
    below = xp.searchsorted(ordered, values, side="left")
    upto = xp.searchsorted(ordered, values, side="right")
    return (xp.astype(below, xp.float64) + xp.astype(upto, xp.float64) + 1.0) / 2.0


def _pearson(xp: Any, a: Array, b: Array) -> Array:
    """Pearson correlation of flat values, NaN where a side is constant."""
    a, b = a - xp.mean(a), b - xp.mean(b)
    return ratio(xp, xp.sum(a * b), xp.sqrt(xp.sum(a * a)) * xp.sqrt(xp.sum(b * b)))


def _neighbours(xp: Any, similarity: Array, k: int) -> Array:
    """Booleans (n, n): j is among the k most similar to i, never i itself; the first index wins ties."""
    n = similarity.shape[0]
    own = xp.arange(n, device=device(similarity))
    ranked = xp.where(own[:, None] == own[None, :], xp.full_like(similarity, -xp.inf), similarity)
    nearest = xp.argsort(-ranked, axis=-1, stable=True)[:, :k]
    chosen = xp.zeros((n, n), dtype=xp.bool, device=device(similarity))
    chosen[own[:, None], nearest] = True
    return chosen


def _require_neighbours(n: int, k: int, least: int) -> None:
    """Refuse more neighbours than there are."""
    if not least <= k < n:
        raise ValueError(f"k is {k} for {n} rows; expected {least} ≤ k < {n}")


def mutual_knn(x: Array, y: Array, k: int = 10, *, mask: Array | None = None) -> Array:
    """Mutual k-nearest neighbours: mean share of each row's k nearest, by cosine, that both sides agree on.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows.
    k
        Number of neighbours, below N.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), between 0 and 1; about k/(N − 1) for unrelated data. Source: Huh et al. 2405.07987.

    Raises
    ------
    ValueError
        If ``k`` is not between 1 and N − 1, or rows do not match.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> float(mutual_knn(x, x[:, ::-1], 1))
    1.0
    """

    def of(xp: Any, left: Array, right: Array) -> Array:
        _require_neighbours(left.shape[0], k, 1)
        both = _neighbours(xp, _cosines(xp, left), k) & _neighbours(xp, _cosines(xp, right), k)
        return xp.sum(xp.astype(both, xp.float64)) / (left.shape[0] * k)

    return _each(of, x, y, mask, center=False)


def _cosines(xp: Any, x: Array) -> Array:
    """Cosines of all pairs of rows (n, n), 0 for zero rows."""
    unit = unit_rows(xp, x)[0]
    return unit @ unit.T


def cknna(x: Array, y: Array, k: int = 10, *, mask: Array | None = None) -> Array:
    """CKNNA: unbiased CKA restricted to pairs that are k-nearest neighbours on both sides.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows; rows are set to length 1.
    k
        Number of neighbours, at least 2 and below N.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), 1 for x against itself; NaN where a denominator is not positive. Source: Huh et al. 2405.07987.

    Raises
    ------
    ValueError
        If ``k`` is not between 2 and N − 1, or rows do not match.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(30, 3))
    >>> round(float(cknna(x, 2 * x, 5)), 12)
    1.0
    """

    def of(xp: Any, left: Array, right: Array) -> Array:
        _require_neighbours(left.shape[0], k, 2)
        a, b = _cosines(xp, left), _cosines(xp, right)
        near_a, near_b = (xp.astype(_neighbours(xp, side, k), xp.float64) for side in (a, b))
        both = near_a * near_b
        return cka_from_hsic(
            hsic1(both * a, both * b), hsic1(near_a * a, near_a * a), hsic1(near_b * b, near_b * b)
        )

    return _each(of, x, y, mask, center=False)


# A sketch of the rows, for one pass over any number of tokens


def _hashed(xp: Any, index: Array, seed: int) -> Array:
    """32 well-mixed bits of each index (int64 arithmetic that never overflows)."""
    low = 0xFFFFFFFF
    h = ((index & low) ^ (index >> 32) ^ ((seed * 0x9E3779B1) & low)) & low
    for _ in range(3):
        h = ((h ^ (h >> 16)) * 0x45D9F3B) & low
    return h ^ (h >> 16)


def row_sketch(x: Array, index: Array, m: int, *, seed: int = 0) -> tuple[Array, Array]:
    """Signed row sketch: token i goes, with a random sign, into one of m buckets, the same at every depth.

    S_b = Σ_{i in b} s_i x_i. Additive over batches and ranks, and m d numbers however many tokens.

    Parameters
    ----------
    x
        States (..., N, d).
    index
        Global index of each token (N,), whole numbers: they decide bucket and sign.
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
    >>> whole, _ = row_sketch(x, np.arange(3), 4)
    >>> parts = [row_sketch(x[i : i + 1], np.array([i]), 4)[0] for i in range(3)]
    >>> bool(np.array_equal(whole, sum(parts)))
    True
    """
    matrix = rows(x)
    xp = matrix.xp
    index = xp.astype(xp.asarray(index, device=device(matrix.values)), xp.int64)
    if m < 2 or tuple(index.shape) != (matrix.values.shape[-2],):
        raise ValueError(
            f"index has shape {tuple(index.shape)} and m is {m}; expected one index for each of the "
            f"{matrix.values.shape[-2]} rows, and at least 2 buckets"
        )
    h = _hashed(xp, index, seed)
    bucket, sign = (h >> 1) % m, xp.astype(1 - 2 * (h & 1), xp.float64)
    chosen = xp.arange(m, device=device(matrix.values))[:, None] == bucket[None, :]
    signed = xp.astype(chosen, xp.float64) * sign
    return signed @ matrix.values, xp.sum(signed, axis=-1)


def cka_from_sketch(
    sketch: Array, signs: Array, mean: Array, *, diagonals: Array | None = None, count: int | None = None
) -> Array:
    """Unbiased linear CKA of all layers from row sketches: Gram products of the buckets without the diagonal.

    The mean is removed from the sketch afterwards, S − c μᵀ. Σ_{b≠c} P_bc P'_bc over buckets estimates
    (1 − 1/m) Σ_{i≠j} K_ij L_ij; the terms in the traces of HSIC₁ are of relative order d/N and enter when
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
        raise ValueError("came only one of diagonals and count; expected both or neither")
    xp, sketch = as_float64(sketch, name="sketch", ndim=3)
    centered = sketch - signs[:, None] * mean[:, None, :]
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
