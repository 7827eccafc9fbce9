"""Singular values of very many 3×3 or 4×4 matrices at once: a triangle by reflections, then Jacobi on its Gram matrix.

The rows of the triangle R are scaled very differently and lie at fair angles; of such a matrix R Rᵀ has its
eigenvalues to high relative accuracy, and Jacobi rotations find them so (Demmel and Veselić 1992). Squaring the
matrix itself would lose all singular values below 1e-8 σ₁. Matrices whose rows lie too close are told apart.

Shapes: ``n`` 3 or 4, ``B`` matrices, last; the diagonal is (n, B) and the entries beside it (pairs, B), in the order
of `PAIRS`.
"""

from typing import NamedTuple

import numpy as np

TINY = 1e-290
# Rows of R with less than this share of volume are told apart: errors grow with its inverse.
VOLUME = 1e-3
# Rows of R below this squared length are rounding.
NOISE = 1e-30
ROUNDING = 1e-16
SWEEPS = 8
# So many matrices of a block say whether all need one more sweep.
SAMPLE = 256

# Pairs of one round come together: they share no index.
PAIRS = {3: ((0, 1), (0, 2), (1, 2)), 4: ((0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2))}


class Turn(NamedTuple):
    """One rotation of a round: which of the round's, and the entries beside the diagonal that it mixes."""

    number: int
    of_p: slice  # entries (p, r)
    of_q: slice  # entries (q, r), for the same r


class Round(NamedTuple):
    """Rotations of disjoint pairs (p, q), done at once."""

    pivots: slice
    p: slice
    q: slice
    turns: tuple[Turn, ...]


ROUNDS = {
    3: (
        Round(slice(0, 1), slice(0, 1), slice(1, 2), (Turn(0, slice(1, 2), slice(2, 3)),)),
        Round(slice(1, 2), slice(0, 1), slice(2, 3), (Turn(0, slice(0, 1), slice(2, 3)),)),
        Round(slice(2, 3), slice(1, 2), slice(2, 3), (Turn(0, slice(0, 1), slice(1, 2)),)),
    ),
    4: (
        Round(
            slice(0, 2),
            slice(0, 4, 2),
            slice(1, 4, 2),
            (Turn(0, slice(2, 5, 2), slice(5, 2, -2)), Turn(1, slice(2, 6, 3), slice(4, 2, -1))),
        ),
        Round(
            slice(2, 4),
            slice(0, 2),
            slice(2, 4),
            (Turn(0, slice(0, 5, 4), slice(5, 0, -4)), Turn(1, slice(0, 6, 5), slice(4, 0, -3))),
        ),
        Round(
            slice(4, 6),
            slice(0, 2),
            slice(3, 1, -1),
            (Turn(0, slice(0, 3, 2), slice(3, 0, -2)), Turn(1, slice(0, 4, 3), slice(2, 0, -1))),
        ),
    ),
}


def small_singular_values(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular values (n, B), descending, of matrices (n, n, B) with entries up to 1; and where not to trust them (B,).

    The matrices are overwritten.
    """
    _triangle(a)
    diagonal, beside = _gram(a)
    doubtful = _volume(a, diagonal) < VOLUME
    _diagonalise(diagonal, beside)
    values = np.sqrt(np.maximum(_sorted(diagonal), 0.0))
    return values, doubtful | ~np.isfinite(values).all(axis=0)


def _triangle(a: np.ndarray) -> None:
    """Upper triangles R of A = QR in place, by Householder reflections; what is below the diagonal is left over."""
    for k in range(len(a) - 1):
        column, rest = a[k:, k], a[k:, k + 1 :]
        corner = -np.copysign(np.sqrt(np.einsum("ib,ib->b", column, column)), column[0])
        column[0] -= corner
        along = np.einsum("ib,icb->cb", column, rest)
        along /= corner * column[0] - TINY
        rest += column[:, None] * along
        column[0] = corner


def _gram(r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Diagonal and upper entries of R Rᵀ."""
    n = len(r)
    diagonal = np.stack([np.einsum("cb,cb->b", r[i, i:], r[i, i:]) for i in range(n)])
    beside = np.stack([np.einsum("cb,cb->b", r[i, j:], r[j, j:]) for i, j in PAIRS[n]])
    return diagonal, beside


def _volume(r: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    """Squared volume of the rows of R at length 1; rows below rounding count as upright."""
    volume = np.ones_like(diagonal[0])
    for k, size in enumerate(diagonal):
        volume *= np.where(size > NOISE, r[k, k] ** 2 / np.maximum(size, NOISE), 1.0)
    return volume


def _diagonalise(diagonal: np.ndarray, beside: np.ndarray, sweeps: int = SWEEPS) -> None:
    """Turn symmetric matrices until their diagonals are their eigenvalues: all at once, then those that are late."""
    some = slice(None, None, max(1, diagonal.shape[1] // SAMPLE))
    while sweeps and _last_shift(diagonal[:, some], beside[:, some])[1].mean() > 0.5:
        _sweep(diagonal, beside)
        sweeps -= 1
    shift, late = _last_shift(diagonal, beside)
    rest = np.flatnonzero(late) if sweeps else np.flatnonzero(late)[:0]
    part = diagonal[:, rest], beside[:, rest]
    for (p, q), by in zip(PAIRS[len(diagonal)], shift, strict=True):
        diagonal[p] -= by
        diagonal[q] += by
    if rest.size:
        _sweep(*part)
        _diagonalise(*part, sweeps=sweeps - 1)
        diagonal[:, rest] = part[0]


def _last_shift(diagonal: np.ndarray, beside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What rotations would still move on the diagonal (pairs, B), and where that is more than rounding (B,)."""
    p, q = (diagonal[list(side)] for side in zip(*PAIRS[len(diagonal)], strict=True))
    shift, _ = _tangent(p, q, beside)
    shift *= beside
    p *= q
    p *= ROUNDING**2
    p += NOISE**2
    return shift, (shift * shift > p).any(axis=0)


def _tangent(first: np.ndarray, second: np.ndarray, beside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tangents of the rotations that clear the entries ``beside``; and room to work in."""
    gap = second - first
    twice = beside + beside
    root = twice * twice
    root += gap * gap
    np.sqrt(root, out=root)
    root += TINY
    np.copysign(root, gap, out=root)
    root += gap
    return np.divide(twice, root, out=twice), root


def _sweep(diagonal: np.ndarray, beside: np.ndarray) -> None:
    """Clear every entry beside the diagonal once."""
    for pivots, p, q, turns in ROUNDS[len(diagonal)]:
        tangent, cosine = _tangent(diagonal[p], diagonal[q], beside[pivots])
        shift = tangent * beside[pivots]
        diagonal[p] -= shift
        diagonal[q] += shift
        beside[pivots] = 0.0
        np.multiply(tangent, tangent, out=cosine)
        cosine += 1.0
        np.sqrt(cosine, out=cosine)
        np.divide(1.0, cosine, out=cosine)
        tangent *= cosine
        for number, of_p, of_q in turns:
            _turn(beside[of_p], beside[of_q], cosine[number], tangent[number])


def _turn(x: np.ndarray, y: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> None:
    """Rotate x and y in place."""
    across = sine * x
    x *= cosine
    x -= sine * y
    y *= cosine
    y += across


def _sorted(values: np.ndarray) -> np.ndarray:
    """Rows of (3, B) or (4, B) in descending order, by a network of comparisons."""
    rows = list(values)
    order = ((0, 1), (2, 3), (0, 2), (1, 3), (1, 2)) if len(rows) == 4 else ((0, 1), (1, 2), (0, 1))
    for i, j in order:
        rows[i], rows[j] = np.maximum(rows[i], rows[j]), np.minimum(rows[i], rows[j])
    return np.stack(rows)
