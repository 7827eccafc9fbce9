"""How many directions a matrix uses: spectral ranks, rank collapse, and what iid noise would give.

Shapes: ``...`` batch, ``N`` rows (tokens), ``d`` columns (features), ``k = min(N, d)`` singular values s.

Every spectral rank comes twice: ``effective_rank(x)`` on matrices and ``effective_rank_of(s)`` on singular
values, so that one decomposition serves all. On any matrix
rank ≥ effective rank ≥ entropy rank ≥ participation ratio ≥ stable rank.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from scipy.integrate import quad

from depthscope.diagnostics.kernels._arrays import (
    Array,
    Rows,
    as_array,
    as_float64,
    gram,
    peak,
    ratio,
    rows,
    scaled,
    triangle,
)
from depthscope.diagnostics.kernels._counts import whole

# Below this λ_min/λ_max a float64 Gram can move the effective rank by 1e-7: decompose the matrix itself.
GRAM_LIMIT = 1e-11


def singular_values(x: Array, *, center: bool = False, mask: Array | None = None) -> Array:
    """Singular values in descending order.

    From the eigenvalues of a float64 Gram matrix on the smaller side, and from an SVD of the matrix itself
    where the measured λ_min/λ_max says that squaring the condition would spoil the small ones. Values that
    are zero by construction (masked rows, the direction that centring removes) are exactly zero.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    center
        Remove the mean row first.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        Singular values (..., min(N, d)), float64, in the units of ``x``.

    Raises
    ------
    ValueError
        If a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> singular_values(np.array([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]])).round(12).tolist()
    [4.0, 3.0]
    """
    matrix = rows(x, mask=mask, center=center)
    xp, shape = matrix.xp, matrix.values.shape
    values, scale = scaled(matrix)
    flat = xp.reshape(values, (-1, *shape[-2:]))
    known = xp.reshape(_structural_rank(matrix, center), (-1, 1))
    s = _spectrum(xp, flat, known)
    return xp.reshape(s, (*shape[:-2], -1)) * scale[..., 0]


def _structural_rank(matrix: Rows, center: bool) -> Array:
    """The largest rank that the number of rows and columns allows, (...)."""
    return matrix.xp.clip(matrix.count - float(center), min=0.0, max=float(matrix.values.shape[-1]))


def _spectrum(xp: Any, flat: Array, known: Array) -> Array:
    """Singular values (B, k) of scaled matrices (B, N, d) of structural rank at most ``known`` (B, 1)."""
    possible = xp.arange(min(flat.shape[-2:]), device=device(flat)) < known
    energy = _eigenvalues(xp, flat, possible)
    s = xp.sqrt(energy)
    smallest = xp.min(xp.where(possible, energy, xp.full_like(energy, xp.inf)), axis=-1)
    unreliable = (smallest < GRAM_LIMIT * energy[:, 0]) & (energy[:, 0] > 0)
    if bool(xp.any(unreliable)):
        s[unreliable] = _direct_singular_values(xp, flat[unreliable])
        s = xp.where(possible, s, xp.zeros_like(s))
    return s


def _eigenvalues(xp: Any, flat: Array, possible: Array) -> Array:
    """Eigenvalues (B, k) of the smaller Gram matrix, descending, those that must be zero set to zero."""
    energy = xp.flip(xp.linalg.eigvalsh(gram(xp, flat)), axis=-1)
    return xp.where(possible & (energy > 0), energy, xp.zeros_like(energy))


def _direct_singular_values(xp: Any, x: Array) -> Array:
    """Singular values without squaring: SVD, after a QR where the matrix is long and narrow."""
    tall = xp.matrix_transpose(x) if x.shape[-2] < x.shape[-1] else x
    if tall.shape[-2] > 1.5 * tall.shape[-1]:
        tall = triangle(xp, tall)
    return xp.linalg.svdvals(tall)


def _energies(x: Array, center: bool, mask: Array | None) -> tuple[Any, Array]:
    """Squared singular values up to a common scale; for ranks that the small ones do not move."""
    matrix = rows(x, mask=mask, center=center)
    xp, shape = matrix.xp, matrix.values.shape
    possible = (
        xp.arange(min(shape[-2:]), device=device(matrix.values)) < _structural_rank(matrix, center)[..., None]
    )
    return xp, _eigenvalues(xp, scaled(matrix)[0], possible)


def _as_spectrum(s: Array) -> tuple[Any, Array]:
    """Singular values scaled to a largest of 1, checked: float64, finite, none negative."""
    xp, s = as_float64(s, name="s")
    if bool(xp.any(s < 0)):
        raise ValueError(
            f"s holds negative values (least {float(xp.min(s)):.3g}); expected singular values (..., k) ≥ 0"
        )
    return xp, s / peak(xp, s, axis=-1)


def _exponential_entropy(xp: Any, weights: Array) -> Array:
    """Exp H(w/Σw) along the last axis, NaN where all weights are zero."""
    share = ratio(xp, weights, xp.sum(weights, axis=-1, keepdims=True) + 0.0 * weights)
    logs = xp.log(xp.where(share > 0, share, xp.ones_like(share)))
    return xp.exp(-xp.sum(share * logs, axis=-1))


def effective_rank_of(s: Array) -> Array:
    """Effective rank of singular values: exp H(σ/Σσ).

    Parameters
    ----------
    s
        Singular values (..., k), in any order, zeros allowed.

    Returns
    -------
    Array
        (...), between 1 and k; NaN where all are zero. Source: Roy & Vetterli 2007.

    Examples
    --------
    >>> float(effective_rank_of([2.0, 2.0, 0.0]).round(12))
    2.0
    """
    xp, s = _as_spectrum(s)
    return _exponential_entropy(xp, s)


def effective_rank(x: Array, *, center: bool = False, mask: Array | None = None) -> Array:
    """Effective rank exp H(σ/Σσ): how many directions carry the size of the signal.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    center
        Remove the mean row first.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), between 1 and min(N, d); NaN for a zero matrix. Source: Roy & Vetterli 2007; RankMe 2210.02885.

    Raises
    ------
    ValueError
        If a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> float(effective_rank(np.eye(5)[:3]).round(12))
    3.0
    """
    return effective_rank_of(singular_values(x, center=center, mask=mask))


def entropy_rank_of(s: Array) -> Array:
    """Entropy rank of singular values: exp H(σ²/Σσ²).

    Parameters
    ----------
    s
        Singular values (..., k), in any order, zeros allowed.

    Returns
    -------
    Array
        (...), between 1 and k; NaN where all are zero. Source: Skean et al. 2502.02013.

    Examples
    --------
    >>> float(entropy_rank_of([1.0, 1.0, 1.0, 1.0]).round(12))
    4.0
    """
    xp, s = _as_spectrum(s)
    return _exponential_entropy(xp, s * s)


def entropy_rank(x: Array, *, center: bool = False, mask: Array | None = None) -> Array:
    """Matrix-entropy rank exp H(λ/Σλ), λ = σ²: how many directions carry the energy of the signal.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    center
        Remove the mean row first.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), between 1 and min(N, d); NaN for a zero matrix. Source: Skean et al. 2502.02013.

    Raises
    ------
    ValueError
        If a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> float(entropy_rank(np.diag([1.0, 1.0, 0.0])).round(12))
    2.0
    """
    xp, energy = _energies(x, center, mask)
    return _exponential_entropy(xp, energy)


def participation_ratio_of(s: Array) -> Array:
    """Participation ratio of singular values: (Σσ²)² / Σσ⁴.

    Parameters
    ----------
    s
        Singular values (..., k), in any order, zeros allowed.

    Returns
    -------
    Array
        (...), between 1 and k; NaN where all are zero.

    Examples
    --------
    >>> float(participation_ratio_of([1.0, 1.0, 0.0]))
    2.0
    """
    xp, s = _as_spectrum(s)
    energy = s * s
    return ratio(xp, xp.sum(energy, axis=-1) ** 2, xp.sum(energy * energy, axis=-1))


def participation_ratio(
    x: Array, *, center: bool = False, correct: str | None = None, mask: Array | None = None
) -> Array:
    """Participation ratio (Σλ)² / Σλ², as it is or corrected for the finite sample.

    The plain value is biased: 1/naive ≈ 1/N + 1/d + 1/γ. ``correct="rows"`` removes the bias of sampled rows
    by keeping row indices distinct in numerator and denominator (a ratio of two U-statistics, the denominator
    being HSIC₁(K, K)); ``"both"`` keeps column indices distinct too. A corrected value is an estimate: it
    may exceed min(N, d), and it is negative where the data cannot tell its denominator from zero.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    center
        Remove the mean row first (the corrected estimators then equal those of PyPI's ``dimensionality``).
    correct
        ``None``, ``"rows"`` or ``"both"``.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...); NaN for a zero matrix and where the correction needs more rows (4 centred, 2 uncentred) or
        columns (2). Source: Chun et al. 2509.26560.

    Raises
    ------
    ValueError
        If ``correct`` is unknown or a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> float(participation_ratio(np.diag([1.0, 1.0, 0.0])))
    2.0
    """
    if correct not in (None, "rows", "both"):
        raise ValueError(f"correct is {correct!r}; expected None, 'rows' or 'both'")
    matrix = rows(x, mask=mask, center=center)
    xp = matrix.xp
    trace, square, diagonal = _quartic_sums(xp, scaled(matrix)[0], distinct_columns=correct == "both")
    if correct is None:
        return ratio(xp, trace, square)
    n = matrix.count
    enough = n >= (4 if center else 2)
    if center:
        n = xp.where(enough, n, 4.0 * xp.ones_like(n))
        pairs, link = n / (n - 2.0), 1.0 / ((n - 1.0) * (n - 2.0))
        over = trace - pairs * diagonal + link * (2.0 * square - trace)
        under = square - pairs * diagonal + link * trace
    else:
        over, under = trace - diagonal, square - diagonal
    return xp.where(enough, ratio(xp, over, under), xp.full_like(over, xp.nan))


def _quartic_sums(xp: Any, x: Array, *, distinct_columns: bool) -> tuple[Array, Array, Array]:
    """(tr K)², ‖K‖² and Σ K_ii² of K = XXᵀ, or the same over pairs of distinct columns."""
    energy = x * x
    square = xp.sum(gram(xp, x) ** 2, axis=(-2, -1))
    trace = xp.sum(energy, axis=(-2, -1)) ** 2
    diagonal = xp.sum(xp.sum(energy, axis=-1) ** 2, axis=-1)
    if not distinct_columns:
        return trace, square, diagonal
    same = xp.sum(xp.sum(energy, axis=-2) ** 2, axis=-1)
    return trace - same, square - same, diagonal - xp.sum(energy * energy, axis=(-2, -1))


def stable_rank_of(s: Array) -> Array:
    """Stable rank of singular values: Σσ² / max σ².

    Parameters
    ----------
    s
        Singular values (..., k), in any order, zeros allowed.

    Returns
    -------
    Array
        (...), between 1 and k; NaN where all are zero.

    Examples
    --------
    >>> float(stable_rank_of([2.0, 1.0]))
    1.25
    """
    xp, s = _as_spectrum(s)
    return ratio(xp, xp.sum(s * s, axis=-1), xp.max(s, axis=-1) ** 2)


def stable_rank(x: Array, *, center: bool = False, mask: Array | None = None) -> Array:
    """Stable rank Σλ / λ_max = ‖X‖_F² / ‖X‖₂².

    Parameters
    ----------
    x
        Matrices (..., N, d).
    center
        Remove the mean row first.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), between 1 and min(N, d); NaN for a zero matrix.

    Raises
    ------
    ValueError
        If a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> float(stable_rank(np.diag([2.0, 1.0])))
    1.25
    """
    xp, energy = _energies(x, center, mask)
    return ratio(xp, xp.sum(energy, axis=-1), energy[..., 0])


def numerical_rank_of(s: Array, *, rtol: float | Array = 1e-6) -> Array:
    """Numerical rank of singular values: how many exceed rtol · max σ.

    Parameters
    ----------
    s
        Singular values (..., k), in any order, zeros allowed.
    rtol
        Threshold as a share of the largest; an array (..., 1) gives each spectrum its own.

    Returns
    -------
    Array
        (...), float64 whole numbers between 0 and k; 0, not NaN, where all are zero.

    Examples
    --------
    >>> float(numerical_rank_of([1.0, 1e-3, 1e-9, 0.0]))
    2.0
    """
    xp, s = _as_spectrum(s)
    return xp.sum(xp.astype((s > rtol) & (s > 0), xp.float64), axis=-1)


def numerical_rank(
    x: Array, *, center: bool = False, mask: Array | None = None, rtol: float | None = None
) -> Array:
    """Numerical rank: how many singular values exceed rtol · max σ.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    center
        Remove the mean row first.
    mask
        Booleans (..., N), False for rows that do not count.
    rtol
        Threshold as a share of the largest; by default max(N, d) times the precision of ``x``'s dtype.

    Returns
    -------
    Array
        (...), float64 whole numbers between 0 and min(N, d); 0 for a zero matrix.

    Raises
    ------
    ValueError
        If a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> float(numerical_rank(np.ones((3, 4))))
    1.0
    """
    s = singular_values(x, center=center, mask=mask)
    return numerical_rank_of(s, rtol=_precision(x) * max(as_array(x).shape[-2:]) if rtol is None else rtol)


def _precision(x: Array) -> float:
    """The spacing of floats in the dtype of ``x``; that of float64 for whole numbers."""
    x = as_array(x)
    xp, dtype = array_namespace(x), x.dtype
    return float(xp.finfo(dtype).eps) if xp.isdtype(dtype, "real floating") else float(np.finfo(float).eps)


def condition_of(s: Array) -> Array:
    """Condition number of singular values: max σ / min σ.

    Parameters
    ----------
    s
        Singular values (..., k), in any order.

    Returns
    -------
    Array
        (...), at least 1; infinite where the smallest is zero, NaN where all are.

    Examples
    --------
    >>> float(condition_of([4.0, 2.0]))
    2.0
    """
    xp, s = _as_spectrum(s)
    least, most = xp.min(s, axis=-1), xp.max(s, axis=-1)
    return xp.where(most > 0, xp.nan_to_num(ratio(xp, most, least), nan=xp.inf), xp.full_like(most, xp.nan))


def top_energy_of(s: Array, k: int) -> Array:
    """Share of the energy in the k largest singular values: Σ_{i≤k} σ_i² / Σ σ_i².

    Parameters
    ----------
    s
        Singular values (..., K), in any order, zeros allowed.
    k
        How many, at least 1; more than there are means all.

    Returns
    -------
    Array
        (...), between 0 and 1; NaN where all are zero.

    Raises
    ------
    ValueError
        If ``k`` is below 1.

    Examples
    --------
    >>> float(top_energy_of([2.0, 1.0, 1.0, 1.0, 1.0], 1))
    0.5
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1 direction")
    xp, s = _as_spectrum(s)
    energy = xp.flip(xp.sort(s * s, axis=-1), axis=-1)
    return ratio(xp, xp.sum(energy[..., :k], axis=-1), xp.sum(energy, axis=-1))


def top_energy(x: Array, k: int, *, center: bool = False, mask: Array | None = None) -> Array:
    """Share of the energy in the k strongest directions: Σ_{i≤k} λ_i / Σ λ_i.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    k
        How many directions, at least 1.
    center
        Remove the mean row first.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), between 0 and 1; NaN for a zero matrix.

    Raises
    ------
    ValueError
        If ``k`` is below 1 or a row that counts holds NaN or infinities.

    Examples
    --------
    >>> import numpy as np
    >>> float(top_energy(np.diag([2.0, 1.0]), 1).round(12))
    0.8
    """
    xp, energy = _energies(x, center, mask)
    return top_energy_of(xp.sqrt(energy), k)


def dong_residual(x: Array, *, center: bool = False, mask: Array | None = None) -> Array:
    """Relative residual of rank collapse: √(‖R‖₁ ‖R‖_∞) / √(‖X‖₁ ‖X‖_∞) with R = X − 1x̄ᵀ.

    ‖·‖₁ is the largest column sum and ‖·‖_∞ the largest row sum of absolute values.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    center
        Remove the mean row from the denominator too; the value is then 1 unless all rows are equal.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...); 0 when all rows are equal, NaN for a zero matrix. Source: Dong et al. 2103.03404.

    Raises
    ------
    ValueError
        If a row that counts holds NaN or infinities.

    Examples
    --------
    Rows 1 ± 1: the residual has sums 2 and 1, the matrix 2 and 2.

    >>> import numpy as np
    >>> round(float(dong_residual(np.array([[2.0], [0.0]]))) ** 2, 12)
    0.5
    """
    residual = rows(x, mask=mask, center=True)
    xp = residual.xp
    whole = residual.values if center else rows(x, mask=mask).values
    scale = peak(xp, whole)
    return ratio(xp, _path_norm(xp, residual.values / scale), _path_norm(xp, whole / scale))


def _path_norm(xp: Any, x: Array) -> Array:
    """√(‖X‖₁ ‖X‖_∞), (...)."""
    size = xp.abs(x)
    columns = xp.max(xp.sum(size, axis=-2), axis=-1)
    return xp.sqrt(columns * xp.max(xp.sum(size, axis=-1), axis=-1))


@dataclass(frozen=True)
class MarchenkoPastur:
    """What iid entries give at n rows and d columns, in the limit of large n and d at fixed d/n."""

    n: int
    d: int
    effective_rank: float
    entropy_rank: float
    participation_ratio: float
    stable_rank: float

    def quantile(self, q: Array) -> np.ndarray:
        """Quantiles of the singular values for entries of variance 1; q from 0 (least) to 1 (largest)."""
        few, many = min(self.n, self.d), max(self.n, self.d)
        angle = np.linspace(np.pi, 0.0, 8193)
        energy, density = _semicircle(angle, few / many)
        steps = 0.5 * (density[1:] + density[:-1]) * (np.pi / 8192)
        share = np.concatenate([[0.0], np.cumsum(steps)])
        return np.sqrt(many * np.interp(np.asarray(q, float), share / share[-1], energy))

    def singular_values(self) -> np.ndarray:
        """The expected spectrum (min(n, d),), descending, for entries of variance 1."""
        few = min(self.n, self.d)
        return self.quantile(1.0 - (np.arange(few) + 0.5) / few)


def marchenko_pastur(n: int, d: int) -> MarchenkoPastur:
    """Null expectation of every rank for iid entries: the Marchenko-Pastur law.

    With m = min(n, d) and γ = m / max(n, d): entropy rank m e^(−γ/2), participation ratio m/(1+γ), stable
    rank m/(1+√γ)², effective rank m E[σ] exp(−E[σ ln σ]/E[σ]) by quadrature. Centring n rows leaves n − 1.

    Parameters
    ----------
    n
        Rows.
    d
        Columns, fewer or more than rows.

    Returns
    -------
    MarchenkoPastur
        The expectations, and the quantiles of the singular values.

    Raises
    ------
    ValueError
        If ``n`` or ``d`` is below 1 or not a whole number.

    Examples
    --------
    >>> null = marchenko_pastur(400, 100)
    >>> float(null.participation_ratio), round(null.stable_rank, 4), round(null.effective_rank, 2)
    (80.0, 44.4444, 96.62)
    """
    n, d = whole(n, name="n"), whole(d, name="d")
    few = min(n, d)
    gamma = few / max(n, d)
    mean = _expectation(lambda energy: np.sqrt(energy), gamma)
    spread = _expectation(lambda energy: 0.5 * np.sqrt(energy) * np.log(energy), gamma)
    return MarchenkoPastur(
        n=n,
        d=d,
        effective_rank=few * mean * float(np.exp(-spread / mean)),
        entropy_rank=few * float(np.exp(-gamma / 2)),
        participation_ratio=few / (1 + gamma),
        stable_rank=few / (1 + gamma**0.5) ** 2,
    )


def _semicircle(angle: Array, gamma: float) -> tuple[Array, Array]:
    """Eigenvalue λ = 1 + γ + 2√γ cos θ and the density (2/π) sin²θ / λ over θ in [0, π], γ ≤ 1."""
    near, far = np.cos(angle / 2) ** 2, np.sin(angle / 2) ** 2  # half angles: no cancellation at γ = 1
    energy = (1 - gamma**0.5) ** 2 + 4 * gamma**0.5 * near
    return energy, 8 / np.pi * near * far / energy


def _expectation(of: Any, gamma: float) -> float:
    """E[f(λ)] under the Marchenko-Pastur law of ratio γ ≤ 1 and mean 1."""

    def integrand(angle: float) -> float:
        energy, density = _semicircle(angle, gamma)
        return float(of(energy) * density)

    return float(quad(integrand, 0.0, np.pi, epsabs=1e-11, epsrel=1e-11, limit=200)[0])
