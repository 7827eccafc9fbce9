"""What would endless precision give? Kernels of small matrices in 50 digits, and where they are undefined.

Matrices are numpy arrays of mpmath numbers, (N, d); NaN is what has no value. Written from the definitions, without
regard to speed.
"""

from itertools import combinations

import numpy as np
from mpmath import acos, eigsy, exp, log, matrix, mp, mpf, pi, sqrt

mp.dps = 50
NAN = mpf("nan")
# What 50 digits leave of a zero.
NOTHING = mpf(10) ** -40

square_root = np.vectorize(sqrt, otypes=[object])


def remembered(of):
    """The same function of one matrix, asked once about each."""
    known = {}

    def answer(x):
        key = (x.shape, *x.ravel())
        if key not in known:
            known[key] = of(x)
        return known[key]

    return answer


def wide(x):
    """The same numbers in 50 digits."""
    return np.vectorize(mpf, otypes=[object])(np.asarray(x, dtype=float))


def largest(x):
    return max((abs(v) for v in np.ravel(x)), default=mpf(0))


def cleaned(x, scale):
    """Rounding set to zero."""
    x = np.array(x, dtype=object)
    x[np.abs(x) <= NOTHING * scale] = mpf(0)
    return x


def centred(x):
    shifted = x - x[:1]
    return cleaned(shifted - shifted.sum(axis=0) / len(x), largest(shifted))


def over(a, b):
    return NAN if b == 0 else a / b


def mean(values):
    return sum(values) / len(values) if len(values) else NAN


@remembered
def symmetric(x):
    """Eigenvalues, descending, and eigenvectors of a symmetric matrix."""
    values, vectors = eigsy(matrix(x.tolist()))
    values = list(values)  # numpy makes an array of float64 of a matrix of mpmath 1.4
    order = sorted(range(len(x)), key=lambda i: -values[i])
    vectors = np.array(vectors.tolist(), dtype=object)
    return cleaned(np.array(values)[order], largest(values)), vectors[:, order]


def energies(x):
    small = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    return symmetric(small)[0]


# Ranks


def singular_values(x):
    return square_root(energies(x))


def entropy(weights):
    total = sum(weights)
    return NAN if total == 0 else exp(-sum(w / total * log(w / total) for w in weights if w > 0))


def effective_rank(x):
    return entropy(singular_values(x))


def entropy_rank(x):
    return entropy(energies(x))


def participation_ratio(x):
    e = energies(x)
    return over(sum(e) ** 2, sum(e * e))


def participation_ratio_of_pairs(x):
    """Sums over distinct rows, uncentred."""
    k = x @ x.T
    d = np.diag(k)
    return over(sum(d) ** 2 - sum(d * d), np.sum(k * k) - sum(d * d)) if len(x) > 1 else NAN


def stable_rank(x):
    e = energies(x)
    return over(sum(e), e[0])


def numerical_rank(x, rtol):
    s = singular_values(x)
    return mpf(sum(v > rtol * s[0] for v in s))


def path_norm(x):
    size = np.abs(x)
    return sqrt(max(size.sum(axis=0)) * max(size.sum(axis=1)))


def dong_residual(x):
    return over(path_norm(centred(x)), path_norm(x))


# Geometry


def lengths(x):
    return square_root((x * x).sum(axis=1))


def units(x):
    """Unit rows, and which rows have a direction."""
    size = lengths(x)
    safe = np.where(size == 0, mpf(1), size)
    return x / safe[:, None], size != 0


def angle(u, w):
    """In radians, of unit vectors; acos is sharp enough at 50 digits."""
    return acos(max(mpf(-1), min(mpf(1), u @ w)))


def token_cosine(x):
    u, nonzero = units(x)
    return mean([a @ b for a, b in combinations(u[nonzero], 2)])


def row_cosine(x, y):
    (u, a), (w, b) = units(x), units(y)
    return np.where(a & b, (u * w).sum(axis=1), NAN)


def angular_distance(x, y):
    (u, a), (w, b) = units(x), units(y)
    return mean([angle(*pair) / pi for pair in zip(u[a & b], w[a & b], strict=True)])


def block_influence(x, y):
    (u, a), (w, b) = units(x), units(y)
    return mean([1 - p @ q for p, q in zip(u[a & b], w[a & b], strict=True)])


def massive_activations(x):
    size = np.abs(x)
    ordered = sorted(size.ravel())
    middle = (ordered[(size.size - 1) // 2] + ordered[size.size // 2]) / 2
    return (size > 100) & (size > 1000 * middle)


def massive_tokens(x):
    return massive_activations(x).any(axis=1)


# Similarity


def off_diagonal(k):
    k = k.copy()
    np.fill_diagonal(k, mpf(0))
    return k


def song(k, q):
    n = len(k)
    if n < 4:
        return NAN
    k, q = off_diagonal(k), off_diagonal(q)
    sums = k.sum() * q.sum() / ((n - 1) * (n - 2))
    return ((k * q.T).sum() + sums - mpf(2) / (n - 2) * (k.sum(axis=0) @ q.sum(axis=1))) / (n * (n - 3))


def biased(k, q):
    def both(m):
        return m - m.sum(axis=0) / len(m) - m.sum(axis=1)[:, None] / len(m) + m.sum() / len(m) ** 2

    return (both(k) * both(q)).sum() / max(len(k) - 1, 1) ** 2


def alignment(hsic, k, q):
    own = [hsic(m, m) for m in (k, q)]
    defined = all(v > NOTHING * largest(m) ** 2 for v, m in zip(own, (k, q), strict=True))
    return hsic(k, q) / sqrt(own[0]) / sqrt(own[1]) if defined else NAN


@remembered
def kernel(x):
    x = centred(x)
    return x @ x.T


def linear_cka(x, y, hsic=biased):
    return alignment(hsic, kernel(x), kernel(y))


# Gradients


def gradient_norm(g):
    return sqrt((g * g).sum())


def channel_variance(x):
    return mean((centred(x) ** 2).sum(axis=0) / len(x))
