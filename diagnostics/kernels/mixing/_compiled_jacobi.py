"""The rotations of `_jacobi` compiled: eigenvalues of very many symmetric 3×3 or 4×4 matrices, some lanes at a time.

By numba, where it is installed; `_jacobi` gives the same numbers elsewhere.
Shapes: ``n`` 3 or 4, ``B`` matrices, last; ``pairs`` n (n − 1) / 2.
"""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

# So many matrices are rotated together: their arrays stay in the first-level cache, and loops over them become vectors.
LANES = 64
MANY = 2**21  # matrices; 0.2 µs are saved for each


def worth_compiling(size: int) -> bool:
    """Whether numba, whose import alone takes half a second, is loaded already, as in a training, or pays for so many."""
    return "numba" in sys.modules or size >= MANY


@cache
def compiled_rotations() -> Callable[..., Any] | None:
    """``rotate(diagonal, off_diagonal, place, sweeps, rounding, noise, tiny)``; None where numba is missing or fails.

    ``place`` (n, n) is the row of each entry in ``off_diagonal``. The diagonal becomes the eigenvalues, in place.
    """
    try:
        import numba

        # As numpy divides: an exception for a division by zero would keep loops from becoming vectors.
        options: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
        rotate = numba.njit(**options, fastmath={"contract"})(_rotate)
        rotate(np.ones((3, 1)), np.zeros((3, 1)), np.zeros((3, 3), np.int64), 1, 1e-16, 1e-30, 1e-290)
    except Exception:  # numba missing, too old for this Python, or without a folder to write to
        return None
    return rotate


def _rotate(  # noqa: C901  loops over pairs and lanes: compiled, and a function of each part would be a call
    diagonal: np.ndarray,
    off_diagonal: np.ndarray,
    place: np.ndarray,
    sweeps: int,
    rounding: float,
    noise: float,
    tiny: float,
) -> None:
    n, size = diagonal.shape
    cosine, sine, moved = np.empty(LANES), np.empty(LANES), np.empty(LANES)
    for start in range(0, size, LANES):
        lanes = min(LANES, size - start)
        for _ in range(sweeps):
            for b in range(lanes):
                moved[b] = 0.0
            for p in range(n - 1):
                for q in range(p + 1, n):
                    first, second = diagonal[p, start : start + lanes], diagonal[q, start : start + lanes]
                    across = off_diagonal[place[p, q], start : start + lanes]
                    for b in range(lanes):
                        # t = 2b / (gap + sign(gap) √(gap² + 4b²)), as in `_jacobi`.
                        gap = second[b] - first[b]
                        twice = across[b] + across[b]
                        root = np.sqrt(twice * twice + gap * gap) + tiny
                        tangent = twice / (gap + (root if gap >= 0.0 else -root))
                        shift = tangent * across[b]
                        limit = first[b] * second[b] * rounding * rounding + noise * noise
                        moved[b] += 1.0 if shift * shift > limit else 0.0
                        first[b] -= shift
                        second[b] += shift
                        across[b] = 0.0
                        cosine[b] = 1.0 / np.sqrt(tangent * tangent + 1.0)
                        sine[b] = tangent * cosine[b]
                    for r in range(n):
                        if r != p and r != q:
                            x = off_diagonal[place[p, r], start : start + lanes]
                            y = off_diagonal[place[q, r], start : start + lanes]
                            for b in range(lanes):
                                turned = cosine[b] * x[b] - sine[b] * y[b]
                                y[b] = cosine[b] * y[b] + sine[b] * x[b]
                                x[b] = turned
            late = 0.0
            for b in range(lanes):
                late += moved[b]
            if late == 0.0:
                break
