"""Over how many directions is the signal spread? Effective rank and entropy rank.

Shapes: ``...`` batch, ``N`` rows (tokens), ``d`` columns (features), ``k = min(N, d)`` singular values s.
"""

from typing import Any

from depthscope.diagnostics.kernels._arrays import Array, ratio
from depthscope.diagnostics.kernels.rank.spectrum import as_spectrum, energies, singular_values


def _exponential_entropy(xp: Any, weights: Array) -> Array:
    """Exp H(w/Σw) along the last axis, NaN where all weights are zero."""
    # Adding 0 · weights broadcasts the sum to their shape.
    share = ratio(xp, weights, xp.sum(weights, axis=-1, keepdims=True) + 0.0 * weights)
    # p ln p is 0 at p = 0; the logarithm of 1 gives that without a warning.
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
    xp, s = as_spectrum(s)
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
    xp, s = as_spectrum(s)
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

    Examples
    --------
    >>> import numpy as np
    >>> float(entropy_rank(np.diag([1.0, 1.0, 0.0])).round(12))
    2.0
    """
    xp, energy = energies(x, center, mask)
    return _exponential_entropy(xp, energy)
