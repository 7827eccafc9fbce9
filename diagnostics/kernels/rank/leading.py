"""How much of the energy is in the strongest direction? Stable rank.

Shapes: ``...`` batch, ``N`` rows (tokens), ``d`` columns (features), ``k = min(N, d)`` singular values s.
"""

from depthscope.diagnostics.kernels._arrays import Array, ratio
from depthscope.diagnostics.kernels.rank.spectrum import as_spectrum, energies


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
    xp, s = as_spectrum(s)
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

    Examples
    --------
    >>> import numpy as np
    >>> float(stable_rank(np.diag([2.0, 1.0])))
    1.25
    """
    xp, energy = energies(x, center, mask)
    return ratio(xp, xp.sum(energy, axis=-1), energy[..., 0])
