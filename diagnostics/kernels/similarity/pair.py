"""Two sides of a comparison: the same batch, the same rows, whatever widths.

Shapes: ``...`` batch, ``N`` rows (the same tokens on both sides), ``d`` columns (features).
"""

from collections.abc import Callable
from typing import Any

from depthscope.diagnostics.kernels._arrays import Array, Rows, of_one_library, rows, selected


def pair(x: Array, y: Array, mask: Array | None, *, center: bool) -> tuple[Rows, Rows]:
    """Two batches of matrices with the same batch and rows."""
    x, y = of_one_library(x, y)
    a = rows(x, mask=mask, center=center)
    b = rows(y, mask=mask, center=center, name="y")
    if a.values.shape[:-1] != b.values.shape[:-1]:
        raise ValueError(
            f"x and y have shapes {tuple(a.values.shape)} and {tuple(b.values.shape)}; expected equal "
            "batch and rows (..., N); widths may differ"
        )
    return a, b


def each(
    of: Callable[[Any, Array, Array], Array], x: Array, y: Array, mask: Array | None, *, center: bool = True
) -> Array:
    """A number for each pair of matrices of a batch, over the rows that count."""
    a, b = pair(x, y, mask, center=center)
    found = [of(a.xp, left, right) for left, right in zip(selected(a), selected(b), strict=True)]
    return a.xp.reshape(a.xp.stack(found), a.values.shape[:-2])
