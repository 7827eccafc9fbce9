"""How similar are all layers? CKA of every pair, exact at any common offset, from tiles of Gram matrices.

Shapes: ``...`` batch, ``N`` rows (the same tokens on both sides), ``d`` columns (features).
"""

from typing import Any, NamedTuple

from array_api_compat import array_namespace, device

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array, Rows, as_array, rows, scaled
from depthscope.diagnostics.kernels.similarity.cka import cka_from_hsic

# Entries of one block of Gram rows over all layers: 32 MB in float32, large enough for fast matrix products and small
# enough that no N × N matrix of every layer is in memory.
BLOCK = 8_000_000
# Unbiased HSIC is a difference of sums. Where it is smaller than they are by more than this factor, the 1e-7 of float32
# tiles grow beyond 1e-6, and the tiles are computed in float64. A heuristic of ours.
CANCELLATION = 8.0


def cka_matrix(x: Array, *, unbiased: bool = False, mask: Array | None = None) -> Array:
    """Linear CKA of every layer with every other, exact at any common offset.

    Parameters
    ----------
    x
        Layers (L, N, d) over the same tokens.
    unbiased
        Use Song's HSIC₁ (may be negative, not clipped), else the biased HSIC.
    mask
        Booleans (N,), False for tokens that do not count.

    Returns
    -------
    Array
        (L, L), float64; NaN for layers without variance. Source: Kornblith et al. 1905.00414.

    Raises
    ------
    InputError
        If ``x`` is not a stack of layers.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> cka_matrix(np.stack([x, 3 * x[:, ::-1] + 1e4])).round(12).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    return _ratios(x, mask, (unbiased,))[0]


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
    biased, unbiased = _ratios(x, mask, (False, True))
    return biased, unbiased


def _ratios(x: Array, mask: Array | None, estimators: tuple[bool, ...]) -> list[Array]:
    """CKA of layers with each other, (L, L) for each estimator."""
    products = _products(x, mask, in_float32=True)
    if True in estimators and _is_inexact(products):
        products = _products(x, mask, in_float32=False)
    found = []
    for table in (_unbiased(products) if unbiased else _biased(products) for unbiased in estimators):
        own = array_namespace(table).linalg.diagonal(table)
        found.append(cka_from_hsic(table, own[:, None], own[None, :]))
    return found


class _Layers(NamedTuple):
    """Centred layers whose longest row has length 1."""

    values: Array  # (L, n, d), float32 where that is exact enough
    square_lengths: Array  # (L, n), float64, the diagonals of the Gram matrices


class _Products(NamedTuple):
    """The sums that both estimators combine, for layers of unit size with Gram matrices K and L."""

    distinct: Array  # (L, L), Σ_{i≠j} K_ij L_ij
    shared: Array  # (L, L), Σ_i K_ii L_ii
    traces: Array  # (L, L), tr K tr L
    num_rows: int
    in_float32: bool  # whether tiles were computed in float32


def _products(x: Array, mask: Array | None, *, in_float32: bool) -> _Products:
    """The sums for all pairs of layers."""
    xp, of = _layers(x, mask, in_float32)
    shared = of.square_lengths @ xp.matrix_transpose(of.square_lengths)
    traces = xp.sum(of.square_lengths, axis=-1)
    return _Products(
        distinct=_distinct_products(xp, of.values, shared),
        shared=shared,
        traces=traces[:, None] * traces[None, :],
        num_rows=of.values.shape[1],
        in_float32=of.values.dtype != xp.float64,
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


def _layers(x: Array, mask: Array | None, in_float32: bool) -> tuple[Any, _Layers]:
    """Layers (L, N, d) centred in float64; stored in float32 if ``in_float32`` and their dtype is no wider."""
    x = as_array(x)
    if x.ndim != 3 or 0 in x.shape:
        raise InputError(f"x has shape {tuple(x.shape)}; expected layers (L, N, d), none of them empty")
    xp = array_namespace(x)
    in_float32 = in_float32 and x.dtype != xp.float64 and xp.isdtype(x.dtype, "real floating")
    stored, square_lengths = None, []
    for index in range(x.shape[0]):  # one at a time: only one float64 copy of a layer is in memory
        matrix, square = _unit(x[index], mask, f"x[{index}]")
        values = matrix.values
        if matrix.mask is not None:
            values, square = values[matrix.mask], square[matrix.mask]
        if stored is None:  # the number of rows that count is known now
            dtype = xp.float32 if in_float32 else xp.float64
            stored = xp.empty((x.shape[0], *values.shape), dtype=dtype, device=device(values))
        stored[index] = values
        square_lengths.append(square)
    return xp, _Layers(stored, xp.stack(square_lengths))


def _unit(layer: Array, mask: Array | None, name: str) -> tuple[Rows, Array]:
    """A centred layer with a longest row of length 1, and its squared row lengths (N,)."""
    matrix = rows(layer, mask=mask, center=True, name=name)
    xp = matrix.xp
    values, _ = scaled(matrix)
    square = xp.linalg.vecdot(values, values)
    length = xp.sqrt(xp.max(square))
    length = xp.where(length > 0, length, xp.ones_like(length))
    values /= length
    return matrix._replace(values=values), square / length**2


def _distinct_products(xp: Any, x: Array, shared: Array) -> Array:
    """Σ_{i≠j} K_ij L_ij of all pairs of layers, (L, L), float64; ``shared`` is Σ_i K_ii L_ii."""
    # Gram tiles cost about N² L (d + L) multiplications, cross-covariances N L² d². The margin of 1.1 is a heuristic:
    # tiles are larger products.
    layers, n, width = x.shape
    if n * (width + layers) > 1.1 * layers * width**2:
        return _covariance_products(xp, x) - shared
    return _gram_products(xp, x)


def _gram_products(xp: Any, x: Array) -> Array:
    """Σ_{i≠j} K_ij L_ij from blocks of rows of the Gram matrices, of which only the upper triangle is computed."""
    layers, n, _ = x.shape
    block = max(1, min(n, BLOCK // max(1, layers * n)))
    total = xp.zeros((layers, layers), dtype=xp.float64, device=device(x))
    for start in range(0, n, block):
        tile = _gram_tile(xp, x, start, block)
        # (rows, L, L): one product for each row of tokens, so that float32 sums have at most N terms; rows are then
        # added in float64. The factor 2 is for the lower triangle.
        products = tile @ xp.matrix_transpose(tile)
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


def _covariance_products(xp: Any, x: Array, rows_at_once: int = 1024) -> Array:
    """Σ_ij K_ij L_ij = ‖X_aᵀX_b‖_F² of all pairs; blocks of rows are summed in float64."""
    table = xp.zeros((x.shape[0], x.shape[0]), dtype=xp.float64, device=device(x))
    for i in range(x.shape[0]):
        for j in range(i, x.shape[0]):
            cross = 0.0
            for start in range(0, x.shape[1], rows_at_once):
                part = slice(start, start + rows_at_once)
                cross = cross + xp.astype(xp.matrix_transpose(x[i, part]) @ x[j, part], xp.float64)
            table[i, j] = table[j, i] = xp.sum(cross * cross)
    return table
