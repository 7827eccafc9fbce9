"""How similar are all layers? CKA of every pair, exact at any common offset, from tiles of Gram matrices.

Shapes: ``...`` batch, ``N`` rows (the same tokens on both sides), ``d`` columns (features).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from array_api_compat import array_namespace, device

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import (
    NO_MASK,
    Array,
    Rows,
    as_array,
    of_one_library,
    rows,
    scaled,
)
from depthscope.diagnostics.kernels.similarity.cka import cka_from_hsic, linear_hsic

# Entries of one block of Gram rows over all layers: 32 MB in float32, large enough for fast matrix products and small
# enough that no N × N matrix of every layer is in memory.
BLOCK = 8_000_000
# Unbiased HSIC is a difference of sums. Where it is smaller than they are by more than this factor, the 1e-7 of float32
# tiles grow beyond 1e-6, and the tiles are computed in float64. A heuristic of ours.
CANCELLATION = 8.0


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
    InputError
        If shapes disagree.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> cka_matrix(np.stack([x, 3 * x[:, ::-1] + 1e4])).round(12).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    found = _hsic(x, y, mask, unbiased)
    return cka_from_hsic(found.table, found.own_x[:, None], found.own_y[None, :])


def cka_matrices(x: Array, *, mask: Array | None = None) -> tuple[Array, Array]:
    """Biased and unbiased linear CKA of every layer with every other, from the same products.

    Parameters
    ----------
    x
        Layers (L, N, d) over the same tokens.
    mask
        Booleans (N,), False for tokens that do not count.

    Returns
    -------
    tuple
        `cka_matrix` biased and unbiased, (L, L) each, at the cost of one.

    Raises
    ------
    InputError
        If ``x`` is not a stack of layers.

    Examples
    --------
    >>> import numpy as np
    >>> biased, unbiased = cka_matrices(np.random.default_rng(0).normal(size=(2, 20, 30)))
    >>> bool(biased[0, 1] > 0.5), bool(abs(unbiased[0, 1]) < 0.2)
    (True, True)
    """
    (biased, unbiased), _ = _own_tables(x, mask, (False, True))
    return _ratio_to_own(biased), _ratio_to_own(unbiased)


def _ratio_to_own(table: Array) -> Array:
    own = array_namespace(table).linalg.diagonal(table)
    return cka_from_hsic(table, own[:, None], own[None, :])


class _Hsic(NamedTuple):
    """HSIC of layers at unit size, and the factors that restore the units of the input."""

    table: Array  # (L, M)
    own_x: Array  # (L,), of each layer with itself
    own_y: Array  # (M,)
    size_x: Array  # (L,), divisors of the layers: HSIC has their squares, one from each side
    size_y: Array  # (M,)


def _hsic(x: Array, y: Array | None, mask: Array | None, unbiased: bool) -> _Hsic:
    """The HSIC table and that of each layer with itself."""
    if y is None:
        (table,), size = _own_tables(x, mask, (unbiased,))
        own = array_namespace(table).linalg.diagonal(table)
        return _Hsic(table, own, own, size, size)
    x, y = of_one_library(x, y)
    products = _products(x, y, mask, in_float32=not unbiased)
    table = _unbiased(products) if unbiased else _biased(products)
    return _Hsic(
        table, _own_hsic(x, mask, unbiased), _own_hsic(y, mask, unbiased), products.size_x, products.size_y
    )


def _own_tables(x: Array, mask: Array | None, estimators: tuple[bool, ...]) -> tuple[list[Array], Array]:
    """HSIC tables (L, L) of layers with each other, one for each estimator, and the divisors of the layers (L,)."""
    products = _products(x, None, mask, in_float32=True)
    if True in estimators and _is_inexact(products):
        products = _products(x, None, mask, in_float32=False)
    tables = [_unbiased(products) if unbiased else _biased(products) for unbiased in estimators]
    return tables, products.size_x


def _own_hsic(x: Array, mask: Array | None, unbiased: bool) -> Array:
    """HSIC of each layer with itself at unit size, (L,), one layer at a time in float64."""
    found = []
    for layer in as_array(x):
        matrix, _, _ = _unit(layer, mask, "x")
        value = linear_hsic(matrix, matrix, unbiased)
        found.append(value if unbiased else value / matrix.xp.clip(matrix.count - 1.0, min=1.0) ** 2)
    return matrix.xp.stack(found)


class _Layers(NamedTuple):
    """Centred layers whose longest row has length 1."""

    values: Array  # (L, n, d), float32 where that is exact enough
    square_lengths: Array  # (L, n), float64, the diagonals of the Gram matrices
    scales: Array  # (L,), their divisors


class _Products(NamedTuple):
    """The sums that both estimators combine, for layers of unit size with Gram matrices K and L."""

    distinct: Array  # (L, M), Σ_{i≠j} K_ij L_ij
    shared: Array  # (L, M), Σ_i K_ii L_ii
    traces: Array  # (L, M), tr K tr L
    size_x: Array  # (L,), divisors of the layers
    size_y: Array  # (M,)
    num_rows: int
    in_float32: bool  # whether tiles were computed in float32


def _products(x: Array, y: Array | None, mask: Array | None, *, in_float32: bool) -> _Products:
    """The sums for all pairs of layers."""
    xp, a = _layers(x, mask, in_float32, "x")
    b = a if y is None else _layers(y, mask, in_float32, "y")[1]
    n = a.values.shape[1]
    if b.values.shape[1] != n:
        raise InputError(
            f"x and y have {n} and {b.values.shape[1]} rows; expected the same tokens on both sides"
        )
    k, q = a.square_lengths, b.square_lengths
    shared = k @ xp.matrix_transpose(q)
    return _Products(
        distinct=_distinct_products(xp, a.values, None if y is None else b.values, shared),
        shared=shared,
        traces=xp.sum(k, axis=-1)[:, None] * xp.sum(q, axis=-1)[None, :],
        size_x=a.scales,
        size_y=b.scales,
        num_rows=n,
        in_float32=a.values.dtype != xp.float64,
    )


def _biased(of: _Products) -> Array:
    """⟨K_c, L_c⟩ / (n − 1)², NaN for no rows."""
    if of.num_rows == 0:
        return array_namespace(of.distinct).full_like(of.distinct, float("nan"))
    return (of.distinct + of.shared) / max(of.num_rows - 1, 1) ** 2


def _unbiased(of: _Products) -> Array:
    """HSIC₁, NaN below 4 rows."""
    n = of.num_rows
    if n < 4:
        return array_namespace(of.distinct).full_like(of.distinct, float("nan"))
    return (of.distinct + _hsic1_correction(of)) / (n * (n - 3))


def _hsic1_correction(of: _Products) -> Array:
    """What HSIC₁ adds to the products of distinct rows."""
    n = of.num_rows
    return of.traces / ((n - 1) * (n - 2)) - 2.0 / (n - 2) * of.shared


def _is_inexact(of: _Products) -> bool:
    """Whether HSIC₁ of a layer with itself is much smaller than the float32 sums of which it is the difference."""
    if not of.in_float32 or of.num_rows < 4:
        return False
    xp, n = array_namespace(of.distinct), of.num_rows
    terms = xp.linalg.diagonal(of.distinct + of.traces / ((n - 1) * (n - 2)))
    return bool(xp.any(terms > CANCELLATION * xp.linalg.diagonal(of.distinct + _hsic1_correction(of))))


def _layers(x: Array, mask: Array | None, in_float32: bool, name: str) -> tuple[Any, _Layers]:
    """Layers (L, N, d) centred in float64; stored in float32 if ``in_float32`` and their dtype is no wider."""
    x = as_array(x, name=name)
    if x.ndim != 3 or 0 in x.shape:
        raise InputError(f"{name} has shape {tuple(x.shape)}; expected layers (L, N, d), none of them empty")
    xp = array_namespace(x)
    in_float32 = in_float32 and x.dtype != xp.float64 and xp.isdtype(x.dtype, "real floating")
    stored, square_lengths, scales = None, [], []
    for index in range(x.shape[0]):  # one at a time: only one float64 copy of a layer is in memory
        matrix, square, scale = _unit(x[index], mask, f"{name}[{index}]")
        values = matrix.values
        if matrix.mask is not None:
            values, square = values[matrix.mask], square[matrix.mask]
        if stored is None:  # the number of rows that count is known now
            dtype = xp.float32 if in_float32 else xp.float64
            stored = xp.empty((x.shape[0], *values.shape), dtype=dtype, device=device(values))
        stored[index] = values
        square_lengths.append(square)
        scales.append(scale)
    return xp, _Layers(stored, xp.stack(square_lengths), xp.stack(scales))


def _unit(layer: Array, mask: Array | None, name: str) -> tuple[Rows, Array, Array]:
    """A centred layer with a longest row of length 1, its squared row lengths (N,), and the divisor."""
    matrix = rows(layer, mask=mask, center=True, name=name)
    xp = matrix.xp
    values, top = scaled(matrix)
    square = xp.linalg.vecdot(values, values)
    length = xp.sqrt(xp.max(square))
    length = xp.where(length > 0, length, xp.ones_like(length))
    values /= length
    return matrix._replace(values=values), square / length**2, length * top[0, 0]


def _distinct_products(xp: Any, a: Array, b: Array | None, shared: Array) -> Array:
    """Σ_{i≠j} K_ij L_ij of all pairs of layers, (L, M), float64; ``shared`` is Σ_i K_ii L_ii."""
    # Gram tiles cost about N² L (d + L) multiplications, cross-covariances N L² d². The margin of 1.1 is a heuristic:
    # tiles are larger products.
    n, width = a.shape[1], max(a.shape[2], 1 if b is None else b.shape[2])
    if n * (width + a.shape[0]) > 1.1 * a.shape[0] * width**2:
        return _covariance_products(xp, a, b) - shared
    return _gram_products(xp, a, b)


def _gram_products(xp: Any, a: Array, b: Array | None) -> Array:
    """Σ_{i≠j} K_ij L_ij from blocks of rows of the Gram matrices, of which only the upper triangle is computed."""
    n = a.shape[1]
    block = max(1, min(n, BLOCK // max(1, a.shape[0] * n)))
    others = a.shape[0] if b is None else b.shape[0]
    total = xp.zeros((a.shape[0], others), dtype=xp.float64, device=device(a))
    for start in range(0, n, block):
        tile_a = _gram_tile(xp, a, start, block)
        tile_b = tile_a if b is None else _gram_tile(xp, b, start, block)
        # (rows, L, M): one product for each row of tokens, so that float32 sums have at most N terms; rows are then
        # added in float64. The factor 2 is for the lower triangle.
        products = tile_a @ xp.matrix_transpose(tile_b)
        total = total + 2.0 * xp.sum(xp.astype(products, xp.float64), axis=0)
    return total


def _gram_tile(xp: Any, x: Array, start: int, block: int) -> Array:
    """Rows ``start`` … of every layer's Gram matrix, upper part, as (rows, L, columns)."""
    tile = x[:, start : start + block] @ xp.matrix_transpose(x[:, start:])
    size = tile.shape[1]
    # The square block on the diagonal contains every pair twice: √½ in both factors of a product undoes that.
    tile[:, :, :size] *= 0.5**0.5
    diagonal = xp.arange(size, device=device(x))
    tile[:, diagonal, diagonal] = 0.0
    return xp.permute_dims(tile, (1, 0, 2))


def _covariance_products(xp: Any, a: Array, b: Array | None, rows_at_once: int = 1024) -> Array:
    """Σ_ij K_ij L_ij = ‖X_aᵀX_b‖_F² of all pairs; blocks of rows are summed in float64."""
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
        Batches (n_i, d), or stacks of layers (L, n_i, d) for an (L, L) table; 4 rows or more each, all of the
        same layers and features.
    batches_y
        As many batches of the other side, of any width; the same side when ``None``.

    Returns
    -------
    Array
        () or (L, M), float64. It converges to unbiased CKA with more batches of any size.
        Source: Nguyen et al. 2010.15327.

    Raises
    ------
    InputError
        If there is no batch, one has fewer than 4 rows, batches of a side differ in layers or width, or the two
        sides differ in number.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(4, 16, 3))
    >>> round(float(minibatch_cka(list(x), list(2 * x + 1))), 12)
    1.0
    """
    sides_x = _side(batches_x, "batches_x")
    sides_y = sides_x if batches_y is None else _side(batches_y, "batches_y")
    if not sides_x or len(sides_x) != len(sides_y):
        raise InputError(
            f"got {len(sides_x)} and {len(sides_y)} batches; expected as many on both sides, one at least"
        )
    if sides_x[0].ndim != sides_y[0].ndim:
        raise InputError(
            f"batches have shapes {tuple(sides_x[0].shape)} and {tuple(sides_y[0].shape)}; "
            "expected (n, d) on both sides, or (L, n, d) on both"
        )
    total_xy: Any = 0.0
    total_xx: Any = 0.0
    total_yy: Any = 0.0
    for x, y in zip(sides_x, sides_y, strict=True):
        stack_x = x if x.ndim == 3 else x[None]
        stack_y = y if y.ndim == 3 else y[None]
        found = _hsic(stack_x, None if batches_y is None else stack_y, NO_MASK, True)
        # Batches are scaled one by one: sums need the common units back.
        total_xy = total_xy + found.table * found.size_x[:, None] ** 2 * found.size_y[None, :] ** 2
        total_xx = total_xx + found.own_x * found.size_x**4
        total_yy = total_yy + found.own_y * found.size_y**4
    table = cka_from_hsic(total_xy, total_xx[:, None], total_yy[None, :])
    return table if sides_x[0].ndim == 3 else table[0, 0]


def _side(batches: Iterable[Array], side: str) -> list[Array]:
    """The batches of one side: all large enough, of the same layers and features."""
    found: list[Array] = []
    for index, batch in enumerate(batches):
        name = f"{side}[{index}]"
        batch = as_array(batch, name=name)
        if batch.ndim not in (2, 3) or batch.shape[-2] < 4:
            raise InputError(
                f"{name} has shape {tuple(batch.shape)}; expected (n, d) or (L, n, d), and HSIC₁ needs at least "
                "4 rows: drop it or join batches"
            )
        found.append(batch)
        first, _ = of_one_library(found[0], batch, names=(f"{side}[0]", name))
        if (*first.shape[:-2], first.shape[-1]) != (*batch.shape[:-2], batch.shape[-1]):
            raise InputError(
                f"{name} has shape {tuple(batch.shape)} and {side}[0] {tuple(first.shape)}; expected batches of the "
                "same layers and features, only rows may differ: compare layers of different widths two by two"
            )
    return found
