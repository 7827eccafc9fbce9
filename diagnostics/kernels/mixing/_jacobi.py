"""Singular values of very many 3×3 or 4×4 matrices at once: a triangle by reflections, then Jacobi on its Gram matrix.

The rows of the triangle R are scaled very differently and lie at fair angles; of such a matrix R Rᵀ has its
eigenvalues to high relative accuracy, and Jacobi rotations find them so (Demmel and Veselić 1992). Squaring the
matrix itself would lose all singular values below 1e-8 σ₁. Matrices with nearly parallel rows are returned as doubtful.

Why not LAPACK: it is called once for each matrix, and spends most of the time of a 4×4 on checks and loops. Rotations
of all matrices of a block are a few vectorised operations.

Shapes: ``n`` 3 or 4, ``B`` matrices, last; the diagonal is (n, B) and the off-diagonal entries (pairs, B), in the
order of `PAIRS`.
"""

from typing import NamedTuple

import numpy as np

from depthscope.diagnostics.kernels.mixing._compiled_jacobi import compiled_rotations

# Added to divisors that may be zero; too small to change any other: entries are at most 1.
TINY = 1e-290
# Matrices are doubtful where the squared volume of the rows of R at length 1 is below this: errors grow with its inverse.
VOLUME = 1e-3
# Rows of R with a squared length below this, (1e-15)² of the largest entry, are rounding.
NOISE = 1e-30
# A matrix has converged where no rotation would move two eigenvalues p and q by more than this share of √(pq).
ROUNDING = 1e-16
# Jacobi converges quadratically: a few sweeps are enough, eight are a limit.
SWEEPS = 8
# About this many matrices of a block decide whether all get one more sweep: a sample is enough, and costs little.
SAMPLE = 256

# Two consecutive pairs of 4×4 share no index: they are rotated at once.
PAIRS = {3: ((0, 1), (0, 2), (1, 2)), 4: ((0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2))}
# The number of the pair of each entry above the diagonal or below it; on it none is asked for.
PLACES = {
    n: np.array([[pairs.index((min(i, j), max(i, j))) if i != j else 0 for j in range(n)] for i in range(n)])
    for n, pairs in PAIRS.items()
}


class Turn(NamedTuple):
    """One rotation of a round: its number in the round, and the off-diagonal entries that it mixes."""

    number: int
    of_p: slice  # entries (p, r)
    of_q: slice  # entries (q, r), for the same r


class Round(NamedTuple):
    """Rotations of disjoint pairs (p, q), done at once."""

    pivots: slice
    p: slice
    q: slice
    turns: tuple[Turn, ...]


# Slices, not lists of indices: numpy then works on views, in place.
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


def small_singular_values(a: np.ndarray, *, compiled: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Singular values (n, B), descending, of matrices (n, n, B) with entries up to 1; and where they are doubtful (B,).

    The matrices are overwritten; ``compiled``: by numba, where it works.
    """
    _triangle(a)
    diagonal, off_diagonal = _gram(a)
    doubtful = _volume(a, diagonal) < VOLUME
    rotate = compiled_rotations() if compiled else None
    if rotate is None:
        _diagonalise(diagonal, off_diagonal)
    else:
        rotate(diagonal, off_diagonal, PLACES[len(a)], SWEEPS, ROUNDING, NOISE, TINY)
    values = np.sqrt(np.maximum(_sorted(diagonal), 0.0))
    return values, doubtful | ~np.isfinite(values).all(axis=0)


def _triangle(a: np.ndarray) -> None:
    """Upper triangles R of A = QR in place, by Householder reflections; entries below the diagonal are not set to 0."""
    for k in range(len(a) - 1):
        column, rest = a[k:, k], a[k:, k + 1 :]
        # The sign against that of the first entry: their difference then cannot cancel.
        corner = -np.copysign(np.sqrt(np.einsum("ib,ib->b", column, column)), column[0])
        column[0] -= corner
        along = np.einsum("ib,icb->cb", column, rest)
        along /= corner * column[0] - TINY  # −vᵀv/2, zero for a zero column
        rest += column[:, None] * along
        column[0] = corner


def _gram(r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Diagonal and upper entries of R Rᵀ."""
    n = len(r)
    diagonal = np.stack([np.einsum("cb,cb->b", r[i, i:], r[i, i:]) for i in range(n)])
    off_diagonal = np.stack([np.einsum("cb,cb->b", r[i, j:], r[j, j:]) for i, j in PAIRS[n]])
    return diagonal, off_diagonal


def _volume(r: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    """Squared volume (B,) of the parallelepiped of the rows of R at length 1; rows of rounding count as orthogonal."""
    volume = np.ones_like(diagonal[0])
    for k, size in enumerate(diagonal):
        volume *= np.where(size > NOISE, r[k, k] ** 2 / np.maximum(size, NOISE), 1.0)
    return volume


def _diagonalise(diagonal: np.ndarray, off_diagonal: np.ndarray, sweeps: int = SWEEPS) -> None:
    """Rotate symmetric matrices until their diagonals are their eigenvalues, in place.

    All at once, until half of a sample has converged; then, recursively, those that have not.
    """
    some = slice(None, None, max(1, diagonal.shape[1] // SAMPLE))
    while sweeps and _last_shift(diagonal[:, some], off_diagonal[:, some])[1].mean() > 0.5:
        _sweep(diagonal, off_diagonal)
        sweeps -= 1
    shift, late = _last_shift(diagonal, off_diagonal)
    rest = np.flatnonzero(late) if sweeps else np.flatnonzero(late)[:0]
    part = diagonal[:, rest], off_diagonal[:, rest]
    # The last shift is known by now: adding it makes the smaller eigenvalues more accurate than the limit.
    for (p, q), by in zip(PAIRS[len(diagonal)], shift, strict=True):
        diagonal[p] -= by
        diagonal[q] += by
    if rest.size:
        _sweep(*part)
        _diagonalise(*part, sweeps=sweeps - 1)
        diagonal[:, rest] = part[0]


def _last_shift(diagonal: np.ndarray, off_diagonal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Changes of the diagonal by one more rotation each (pairs, B), and where they are more than rounding (B,)."""
    p, q = (diagonal[list(side)] for side in zip(*PAIRS[len(diagonal)], strict=True))
    shift, _ = _tangent(p, q, off_diagonal)
    shift *= off_diagonal
    # |shift| > ROUNDING √(pq): a limit relative to p, the larger, alone would leave q without correct digits.
    p *= q
    p *= ROUNDING**2
    p += NOISE**2
    return shift, (shift * shift > p).any(axis=0)


def _tangent(
    first: np.ndarray, second: np.ndarray, off_diagonal: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tangents of the rotations that make the off-diagonal entries zero; and an array of their shape to reuse.

    t = 2b / (gap + sign(gap) √(gap² + 4b²)), the smaller of two roots: angles up to 45° converge, and do not cancel.
    """
    gap = second - first
    twice = off_diagonal + off_diagonal
    root = twice * twice
    root += gap * gap
    np.sqrt(root, out=root)
    root += TINY
    np.copysign(root, gap, out=root)
    root += gap
    return np.divide(twice, root, out=twice), root


def _sweep(diagonal: np.ndarray, off_diagonal: np.ndarray) -> None:
    """Make every off-diagonal entry zero once; later rotations bring back a little."""
    for pivots, p, q, turns in ROUNDS[len(diagonal)]:
        tangent, cosine = _tangent(diagonal[p], diagonal[q], off_diagonal[pivots])
        shift = tangent * off_diagonal[pivots]
        diagonal[p] -= shift
        diagonal[q] += shift
        off_diagonal[pivots] = 0.0
        # cos θ = 1/√(1 + t²) and sin θ = t cos θ, in place.
        np.multiply(tangent, tangent, out=cosine)
        cosine += 1.0
        np.sqrt(cosine, out=cosine)
        np.divide(1.0, cosine, out=cosine)
        tangent *= cosine
        for number, of_p, of_q in turns:
            _turn(off_diagonal[of_p], off_diagonal[of_q], cosine[number], tangent[number])


def _turn(x: np.ndarray, y: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> None:
    """Rotate x and y in place."""
    across = sine * x
    x *= cosine
    x -= sine * y
    y *= cosine
    y += across


def _sorted(values: np.ndarray) -> np.ndarray:
    """Rows of (3, B) or (4, B) in descending order, by a sorting network: five comparisons of rows for four."""
    rows = list(values)
    order = ((0, 1), (2, 3), (0, 2), (1, 3), (1, 2)) if len(rows) == 4 else ((0, 1), (1, 2), (0, 1))
    for i, j in order:
        rows[i], rows[j] = np.maximum(rows[i], rows[j]), np.minimum(rows[i], rows[j])
    return np.stack(rows)
