"""Do two sides span the same space? SVCCA and PWCCA, which any linear map leaves as they are.

Shapes: ``...`` batch, ``N`` rows (the same tokens on both sides), ``d`` columns (features).
"""

from typing import Any

from array_api_compat import device

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array, peak
from depthscope.diagnostics.kernels.similarity.pairwise import compare_sides


def _basis(xp: Any, x: Array, energy: float) -> Array:
    """Left singular vectors (N, directions), as few as have a share ``energy`` of the variance."""
    u, s, _ = xp.linalg.svd(x / peak(xp, x), full_matrices=False)
    # Directions below rounding are random: canonical correlations would count them in full. The tolerance is that of
    # numpy.linalg.matrix_rank.
    chosen = s > s[0] * max(x.shape) * xp.finfo(xp.float64).eps
    if energy < 1:
        # A direction is needed if those before it have less than the share: the one that reaches it is included.
        energy_before = xp.cumulative_sum(s * s) - s * s
        chosen = chosen & (energy_before < energy * xp.sum(s * s))
    return u[:, chosen]


def svcca(x: Array, y: Array | None = None, *, energy: float = 0.99, mask: Array | None = None) -> Array:
    """SVCCA: mean canonical correlation of the leading singular directions of each side.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows; without y all pairs of layers (L, N, d).
    energy
        Share of the variance in the chosen directions.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...) or (L, L), between 0 and 1, over the smaller number of directions; NaN for a side without variance.
        Source: Raghu et al. 1706.05806.

    Raises
    ------
    InputError
        If a side has N − 1 directions or more (CCA is then 1 by construction), or rows do not match.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(50, 3))
    >>> round(float(svcca(x, x @ np.diag([1.0, 2.0, 3.0]))), 9)
    1.0
    """
    if not 0 < energy <= 1:
        raise InputError(f"energy is {energy}; expected a share of the variance, above 0 and at most 1")

    def prepare(xp: Any, side: Array) -> Array:
        _require_rows(side.shape[0], 1)
        u = _basis(xp, side, energy)
        _require_rows(side.shape[0] - 1, u.shape[1])  # centred rows have N − 1 degrees of freedom
        return u

    def combine(xp: Any, u: Array, w: Array) -> Array:
        if min(u.shape[1], w.shape[1]) == 0:
            return xp.asarray(xp.nan, dtype=xp.float64, device=device(u))
        # Singular values of a product of orthonormal bases are cosines, up to rounding above 1.
        return xp.mean(xp.clip(xp.linalg.svdvals(u.T @ w), max=1.0))

    return compare_sides(prepare, combine, x, y, mask)


def pwcca(x: Array, y: Array | None = None, *, mask: Array | None = None) -> Array:
    """PWCCA: canonical correlations weighted by how much of x each canonical direction accounts for.

    Σ_i α_i ρ_i / Σ_i α_i with α_i = Σ_j |⟨h_i, x_j⟩|, h_i the canonical variates and x_j the features of x;
    not symmetric.

    Parameters
    ----------
    x, y
        Matrices (..., N, d_x) and (..., N, d_y) over the same rows; without y all pairs of layers (L, N, d).
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...) or (L, L), between 0 and 1; NaN for a side without variance. Source: Morcos et al. 1806.05759.

    Raises
    ------
    InputError
        If there are no more rows than features (CCA is then 1 by construction), or rows do not match.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(50, 3))
    >>> round(float(pwcca(x, x @ np.diag([1.0, 2.0, 3.0]))), 9)
    1.0
    """

    def prepare(xp: Any, side: Array) -> tuple[Array, Array]:
        _require_rows(*side.shape)
        u = _basis(xp, side, 1.0)
        return u, u.T @ side

    def combine(xp: Any, left: tuple[Array, Array], right: tuple[Array, Array]) -> Array:
        (u, features), (w, _) = left, right
        if min(u.shape[1], w.shape[1]) == 0:
            return xp.asarray(xp.nan, dtype=xp.float64, device=device(u))
        rotation, correlation, _ = xp.linalg.svd(u.T @ w, full_matrices=False)
        weight = xp.sum(xp.abs(rotation.T @ features), axis=-1)
        return xp.sum(weight * xp.clip(correlation, max=1.0)) / xp.sum(weight)

    return compare_sides(prepare, combine, x, y, mask, symmetric=False)


def _require_rows(n: int, p: int) -> None:
    """Refuse canonical correlations without spare rows."""
    if n <= p:
        raise InputError(
            f"got {n} independent rows for {p} directions; expected more rows, for with n ≤ p "
            "canonical correlations are 1 by construction: give more tokens or fewer directions"
        )
