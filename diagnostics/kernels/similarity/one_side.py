"""A comparison in two parts, so that what a side needs alone is worked out once for all its pairs.

Shapes: ``...`` batch, ``L`` layers, ``N`` rows (the same tokens in all), ``d`` columns (features).
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any

from array_api_compat import array_namespace

from depthscope.diagnostics.kernels._arrays import Array, as_array, rows, selected
from depthscope.diagnostics.kernels.similarity.pair import each

# Sides that are kept for the next pair take about so many bytes at most.
KEPT = 1_000_000_000

Alone = Callable[[Any, Array], Any]
Together = Callable[[Any, Any, Any], Array]


def compared(
    alone: Alone,
    together: Together,
    x: Array,
    y: Array | None,
    mask: Array | None,
    *,
    center: bool = True,
    symmetric: bool = True,
) -> Array:
    """Compare x with y, or without y every layer of x with every other.

    Parameters
    ----------
    alone
        From the namespace and a matrix (N, d), centred if asked: what is known of one side.
    together
        From the namespace and two of those: the number.
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows; or layers (L, N, d) and None.
    mask
        Booleans (..., N), False for rows that do not count; without y (N,).
    center
        Remove the mean row.
    symmetric
        Whether the order of the two does not matter.

    Returns
    -------
    Array
        (...), or (L, L): the first of the two along the first dim.

    Raises
    ------
    ValueError
        If rows do not match or hold NaN or infinities, or without y if x is not a stack of layers.
    """
    if y is None:
        return _table(alone, together, *_layers(x, mask), center=center, symmetric=symmetric)

    def of(xp: Any, left: Array, right: Array) -> Array:
        return together(xp, alone(xp, left), alone(xp, right))

    return each(of, x, y, mask, center=center)


def _layers(x: Array, mask: Array | None) -> tuple[Array, Array | None]:
    """The layers and their mask, refused where they cannot be compared row by row."""
    x, mask = as_array(x), None if mask is None else as_array(mask, name="mask")
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y is None; expected layers (L, N, d), none of them empty: "
            "give y to compare two batches of matrices"
        )
    if mask is not None and mask.ndim != 1:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; expected (N,): all layers have the same rows")
    return x, mask


def _table(
    alone: Alone, together: Together, x: Array, mask: Array | None, *, center: bool, symmetric: bool
) -> Array:
    """All pairs of layers, (L, L)."""
    count, num_rows, width = x.shape
    xp = array_namespace(x)

    @lru_cache(maxsize=max(2, KEPT // (8 * num_rows * max(num_rows, width))))
    def side(layer: int) -> Any:
        return alone(xp, selected(rows(x[layer], mask=mask, center=center))[0])

    found: dict[tuple[int, int], Array] = {}
    for a, b in product(range(count), repeat=2):
        found[a, b] = found[b, a] if symmetric and b < a else together(xp, side(a), side(b))
    return xp.reshape(xp.stack(list(found.values())), (count, count))
