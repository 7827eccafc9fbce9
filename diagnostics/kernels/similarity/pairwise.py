"""How are two sides compared? Pair by pair over a batch, every layer with every other, or rotated.

A comparison has two parts: what one side needs alone (``prepare``: a decomposition, a kernel matrix) is computed once
for all its pairs, and ``combine`` gives the number for two prepared sides.

Shapes: ``...`` batch, ``L`` layers, ``N`` rows (the same tokens on both sides), ``d`` columns (features).
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any

from array_api_compat import array_namespace, device

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import (
    Array,
    Rows,
    as_array,
    of_one_library,
    peak,
    rows,
    selected,
    triangle,
)

# Prepared layers may take about this many bytes of memory; beyond, the least recently used is computed again. A
# heuristic of ours.
CACHE_BYTES = 1_000_000_000

Prepare = Callable[[Any, Array], Any]
Combine = Callable[[Any, Any, Any], Array]


def paired_rows(x: Array, y: Array, mask: Array | None, *, center: bool) -> tuple[Rows, Rows]:
    """Two batches of matrices, checked to have the same batch and rows; widths may differ."""
    x, y = of_one_library(x, y)
    a = rows(x, mask=mask, center=center)
    b = rows(y, mask=mask, center=center, name="y")
    if a.values.shape[:-1] != b.values.shape[:-1]:
        raise InputError(
            f"x and y have shapes {tuple(a.values.shape)} and {tuple(b.values.shape)}; expected equal "
            "batch and rows (..., N); widths may differ"
        )
    return a, b


def compare_sides(
    prepare: Prepare,
    combine: Combine,
    x: Array,
    y: Array | None,
    mask: Array | None,
    *,
    center: bool = True,
    symmetric: bool = True,
) -> Array:
    """Compare x with y, or without y every layer of x with every other.

    ``prepare``: from the namespace and a matrix (N, d) of the rows that count: what is needed of one side.
    ``combine``: from the namespace and two prepared sides: the number.
    ``x, y``: matrices (..., N, d_x) and (..., N, d_y) over the same rows; or layers (L, N, d) and None.
    ``mask``: booleans (..., N), False for rows that do not count; without y (N,).
    ``symmetric``: whether both orders of two sides give the same number.
    Returns: (...), or (L, L) with the first of the two sides along the first dim.
    Raises InputError: If rows do not match, or without y if x is not a stack of layers.
    """
    if y is None:
        return _layer_table(prepare, combine, *_layers(x, mask), center=center, symmetric=symmetric)
    a, b = paired_rows(x, y, mask, center=center)
    found = [
        combine(a.xp, prepare(a.xp, left), prepare(a.xp, right))
        for left, right in zip(selected(a), selected(b), strict=True)
    ]
    return a.xp.reshape(a.xp.stack(found), a.values.shape[:-2])


def _layers(x: Array, mask: Array | None) -> tuple[Array, Array | None]:
    """The layers and their mask, refused where they cannot be compared row by row."""
    x, mask = as_array(x), None if mask is None else as_array(mask, name="mask")
    if x.ndim != 3 or 0 in x.shape:
        raise InputError(
            f"x has shape {tuple(x.shape)} and y is None; expected layers (L, N, d), none of them empty: "
            "give y to compare two batches of matrices"
        )
    if mask is not None and mask.ndim != 1:
        raise InputError(f"mask has shape {tuple(mask.shape)}; expected (N,): all layers have the same rows")
    return x, mask


def _layer_table(
    prepare: Prepare, combine: Combine, x: Array, mask: Array | None, *, center: bool, symmetric: bool
) -> Array:
    """The numbers of all pairs of layers, (L, L)."""
    count, num_rows, width = x.shape
    xp = array_namespace(x)

    # A prepared side is at most a basis (N, d) or a kernel (N, N) in float64; two must fit for any pair.
    @lru_cache(maxsize=max(2, CACHE_BYTES // (8 * num_rows * max(num_rows, width))))
    def prepared(layer: int) -> Any:
        return prepare(xp, selected(rows(x[layer], mask=mask, center=center))[0])

    found: dict[tuple[int, int], Array] = {}
    for a, b in product(range(count), repeat=2):
        # In this order (b, a) with b < a is known already.
        found[a, b] = found[b, a] if symmetric and b < a else combine(xp, prepared(a), prepared(b))
    return xp.reshape(xp.stack(list(found.values())), (count, count))


# Squared distances 2 − 2 Σ σ_i above this have lost two of sixteen digits at most; nearer shapes need their residual.
FAR = 1e-2


def procrustes(
    x: Array, y: Array | None = None, *, squared: bool = False, mask: Array | None = None
) -> Array:
    """Procrustes shape distance: the angle arccos ‖XᵀY‖_* of centred sides at ‖·‖_F = 1.

    Computed from the residual of the best rotation, 2 arcsin(‖X − YQ‖_F/2), accurate down to angles of 1e-15 (the
    arccos is not below 1e-8).

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows, the narrower one as if with zero columns;
        without y all pairs of layers (L, N, d).
    squared
        Give the squared Euclidean distance min_Q ‖X − YQ‖_F² = 2 − 2 cos instead of the angle.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...) or (L, L), angle in radians between 0 and π/2, or its square form between 0 and 2; NaN for a side
        without variance. Source: Williams et al. 2110.14739 (netrep).

    Raises
    ------
    ValueError
        If rows do not match.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    >>> y = np.array([[1.0, 0.0], [1.0, 0.0], [-2.0, 0.0]])
    >>> round(float(procrustes(x, y)), 9) == round(np.pi / 2, 9)
    True
    """

    def combine(xp: Any, left: Array, right: Array) -> Array:
        residual = _rotation_residual(xp, left, right)
        return residual**2 if squared else 2.0 * xp.asin(xp.clip(residual / 2.0, max=1.0))

    return compare_sides(_shape, combine, x, y, mask)


def _shape(xp: Any, x: Array) -> Array:
    """The shape at unit norm, rotated to at most N columns; NaN without variance."""
    if x.shape[0] == 0:
        return xp.full((1, 1), xp.nan, dtype=xp.float64, device=device(x))
    x = x / peak(xp, x)
    # LQ: N rows span N directions at most, and a rotation changes no distance between shapes.
    if x.shape[0] < x.shape[1]:
        x = triangle(xp, x.T).T
    size = xp.linalg.vector_norm(x)
    return x / xp.where(size > 0, size, xp.nan)


def _rotation_residual(xp: Any, a: Array, b: Array) -> Array:
    """min_Q ‖A − BQ‖_F of centred matrices at unit norm, NaN where one is."""
    # The narrower shape is rotated into the columns of the wider one.
    if a.shape[1] < b.shape[1]:
        a, b = b, a
    shared = b.T @ a
    if bool(xp.any(xp.isnan(shared))):  # LAPACK refuses NaN
        return xp.sum(shared)
    far = 2.0 - 2.0 * xp.sum(xp.linalg.svdvals(shared))
    if bool(far > FAR):
        return xp.sqrt(far)
    u, _, vt = xp.linalg.svd(shared, full_matrices=False)
    return xp.linalg.vector_norm(a - b @ (u @ vt))
