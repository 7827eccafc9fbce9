"""How much of the energy is in the strongest directions? Stable rank and top energy.

Shapes: ``...`` batch, ``N`` rows (tokens), ``d`` columns (features), ``k = min(N, d)`` singular values s.
"""

from depthscope.diagnostics.errors import InputError
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
    InputError
        If ``k`` is below 1.

    Examples
    --------
    >>> float(top_energy_of([2.0, 1.0, 1.0, 1.0, 1.0], 1))
    0.5
    """
    if k < 1:
        raise InputError(f"k is {k}; expected at least 1 direction")
    xp, s = as_spectrum(s)
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
    InputError
        If ``k`` is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> float(top_energy(np.diag([2.0, 1.0]), 1).round(12))
    0.8
    """
    xp, energy = energies(x, center, mask)
    return top_energy_of(xp.sqrt(energy), k)
