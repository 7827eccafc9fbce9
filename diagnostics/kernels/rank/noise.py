"""What rank and which singular values would noise have? The Marchenko-Pastur law of iid entries."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from depthscope.diagnostics.kernels._arrays import Array, as_count


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
        """Quantiles of the singular values for entries of variance 1; q from 0 (smallest) to 1 (largest)."""
        few, many = min(self.n, self.d), max(self.n, self.d)
        # In λ the density has square-root edges; in the angle it vanishes smoothly at both, and trapezoids converge.
        angle = np.linspace(np.pi, 0.0, 8193)
        energy, density = _semicircle(angle, few / many)
        steps = 0.5 * (density[1:] + density[:-1]) * (np.pi / 8192)
        share = np.concatenate([[0.0], np.cumsum(steps)])
        return np.sqrt(many * np.interp(np.asarray(q, float), share / share[-1], energy))

    def singular_values(self) -> np.ndarray:
        """The expected spectrum (min(n, d),), descending, for entries of variance 1."""
        few = min(self.n, self.d)
        # The i-th of ``few`` ordered values is expected near the quantile of the middle of its share.
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
        If ``n`` or ``d`` is below 1 or not an integer.

    Examples
    --------
    >>> null = marchenko_pastur(400, 100)
    >>> float(null.participation_ratio), round(null.stable_rank, 4), round(null.effective_rank, 2)
    (80.0, 44.4444, 96.62)
    """
    n, d = as_count(n, name="n"), as_count(d, name="d")
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
    # Half angles: at γ = 1 the smallest eigenvalue is 0, and 1 + γ + 2√γ cos θ would cancel to rounding there.
    near, far = np.cos(angle / 2) ** 2, np.sin(angle / 2) ** 2
    energy = (1 - gamma**0.5) ** 2 + 4 * gamma**0.5 * near
    return energy, 8 / np.pi * near * far / energy


def _expectation(of: Callable[[float], float], gamma: float) -> float:
    """E[f(λ)] under the Marchenko-Pastur law of ratio γ ≤ 1 and mean 1."""
    from scipy.integrate import quad  # half a second to import, which a capture need not wait for

    def integrand(angle: float) -> float:
        energy, density = _semicircle(angle, gamma)
        return float(of(energy) * density)

    return float(quad(integrand, 0.0, np.pi, epsabs=1e-11, epsrel=1e-11, limit=200)[0])
