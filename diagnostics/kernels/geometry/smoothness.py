"""How much of the tokens' energy is in their differences? The Dirichlet energy of a token graph.

Shapes: ``...`` batch, ``N`` rows (tokens, in order), ``d`` columns (features).
"""

from typing import Any

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array, peak, ratio, rows


def dirichlet_energy(x: Array, *, graph: str = "complete", mask: Array | None = None) -> Array:
    """Dirichlet energy of the token graph: tr(XᵀLX) / ‖X‖_F², ½ Σ_ij A_ij ‖x_i − x_j‖² over ‖X‖².

    ``"complete"`` links every pair with weight 1/N, so that L = I − 11ᵀ/N (the complement of uniform attention)
    and the value is between 0 and 1; ``"path"`` links each token to the next with weight 1, between 0 and 4.

    Parameters
    ----------
    x
        Matrices (..., N, d), rows in order.
    graph
        ``"complete"`` or ``"path"``.
    mask
        Booleans (..., N), False for rows that do not count; the path skips them.

    Returns
    -------
    Array
        (...); 0 when all rows are equal, NaN for a zero matrix.

    Raises
    ------
    InputError
        If ``graph`` is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0], [-1.0], [0.0]])
    >>> float(dirichlet_energy(x)), float(dirichlet_energy(x, graph="path"))
    (1.0, 2.5)
    """
    if graph not in ("complete", "path"):
        raise InputError(f"graph is {graph!r}; expected 'complete' or 'path'")
    matrix = rows(x, mask=mask)
    xp, values = matrix.xp, matrix.values
    scale = peak(xp, values)
    # L is a projection: the energy of the complete graph is ‖X − 1x̄ᵀ‖_F², of N d operations in place of N² d.
    complete = graph == "complete"
    differences = rows(x, mask=mask, center=True).values if complete else _steps(xp, values, matrix.mask)
    differences, values = differences / scale, values / scale
    return ratio(xp, xp.sum(differences * differences, axis=(-2, -1)), xp.sum(values * values, axis=(-2, -1)))


def _steps(xp: Any, x: Array, mask: Array | None) -> Array:
    """Differences of successive rows that count; rows past the last one are zero."""
    if mask is None:
        return x[..., 1:, :] - x[..., :-1, :]
    # A stable sort moves masked rows to the end, and leaves the others in order.
    order = xp.argsort(xp.astype(~mask, xp.int64), axis=-1, stable=True)
    x = xp.take_along_axis(x, xp.broadcast_to(order[..., None], x.shape), axis=-2)
    linked = xp.take_along_axis(mask, order, axis=-1)[..., 1:, None]
    return xp.where(linked, x[..., 1:, :] - x[..., :-1, :], xp.zeros_like(x[..., 1:, :]))
