"""What do the connections so far do to each token? The gains of a matrix and of the product up to it, in one compiled pass.

By numba, where it is installed; torch gives the same numbers elsewhere (`live_sums`).
Shapes: t every token of a batch, N stream.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch


class Product(NamedTuple):
    """The product of the matrices of every token up to a connection, the later ones on the left.

    ``matrix``: (t, N, N), float64, with its largest entry at 1; ``scale``: (t,), the logarithm of what it was divided by.
    """

    matrix: torch.Tensor
    scale: torch.Tensor


def is_available() -> bool:
    """Whether numba is installed and works."""
    return _kernel() is not None


def compiled_gains(mix_tNN: torch.Tensor, before: Product | None) -> tuple[torch.Tensor, Product]:
    """The largest signed sums of rows and of columns, of the matrices of one connection and of the product up to it.

    ``before``: up to the connection before, which is overwritten; None for the first one.
    Returns: (2, t, 2): of the matrix, and of the product; each over the last axis, and over the one before.
    """
    kernel = _kernel()
    assert kernel is not None
    mix = mix_tNN.to(torch.float64, memory_format=torch.contiguous_format).contiguous()
    product = before or Product(torch.empty_like(mix), torch.zeros(len(mix), dtype=torch.float64))
    gains = torch.empty(2, len(mix), 2, dtype=torch.float64)
    kernel(mix.numpy(), before is None, product.matrix.numpy(), product.scale.numpy(), gains.numpy())
    return gains, product


@cache
def _kernel() -> Callable[..., Any] | None:
    """The compiled function; None where numba is not installed, or fails to compile on this machine."""
    try:
        import numba

        options: dict[str, Any] = {"nogil": True, "cache": True}
        kernel = numba.njit(**options)(_gains)
        one = np.ones((1, 2, 2))
        kernel(one, True, one.copy(), np.zeros(1), np.empty((2, 1, 2)))
    except Exception:  # numba missing, too old for this Python, or without a folder to write to
        return None
    return kernel


def _gains(  # noqa: C901  one loop over tokens: compiled, and a function of each part would be a call for each token
    mix: np.ndarray, is_first: bool, product: np.ndarray, scale: np.ndarray, gains: np.ndarray
) -> None:
    tokens, n, _ = mix.shape
    made = np.empty((n, n))
    for t in range(tokens):
        for part in range(2):
            factor = 1.0
            if part == 0:
                for i in range(n):
                    for j in range(n):
                        made[i, j] = mix[t, i, j]
            else:
                size = 0.0
                for i in range(n):
                    for j in range(n):
                        total = mix[t, i, j] if is_first else 0.0
                        if not is_first:
                            for k in range(n):
                                total += mix[t, i, k] * product[t, k, j]
                        made[i, j] = total
                        # NaN is larger than anything, and stays.
                        if abs(total) > size or total != total:
                            size = abs(total)
                # A product of exactly zero stays zero; NaN and infinities stay what they are.
                if not size > 0.0:
                    size = 1.0
                for i in range(n):
                    for j in range(n):
                        made[i, j] /= size
                        product[t, i, j] = made[i, j]
                scale[t] += np.log(size)
                factor = np.exp(scale[t])
            rows, columns = 0.0, 0.0
            for i in range(n):
                of_row, of_column = 0.0, 0.0
                for j in range(n):
                    of_row += made[i, j]
                    of_column += made[j, i]
                if abs(of_row) > rows or of_row != of_row:
                    rows = abs(of_row)
                if abs(of_column) > columns or of_column != of_column:
                    columns = abs(of_column)
            gains[part, t, 0] = rows * factor
            gains[part, t, 1] = columns * factor
