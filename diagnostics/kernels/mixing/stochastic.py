"""How near is a mixing matrix to doubly stochastic? Sinkhorn, row and column sums, entropy, contraction."""

from typing import NamedTuple

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array, as_count
from depthscope.diagnostics.kernels.mixing._matrices import identity, square


def sinkhorn(logits: Array, steps: int = 20, last: str = "row") -> Array:
    """Sinkhorn-Knopp of exp(logits): columns and rows normalised in turn, ``steps`` times, in logarithms.

    Parameters
    ----------
    logits
        (..., n, n).
    steps
        Number of (column, row) rounds; mHC uses 20.
    last
        ``"row"`` (mHC: row sums exact, truncation error in the columns) or ``"column"``.

    Returns
    -------
    Array
        Nearly doubly stochastic matrices (..., n, n). Source: mHC 2512.24880, Eq. 9.

    Raises
    ------
    InputError
        If ``last`` is not one of those, ``steps`` not an integer of 1 or more, or logits are not finite.

    Examples
    --------
    >>> sinkhorn([[0.0, 0.0], [0.0, 0.0]]).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    if last not in ("row", "column"):
        raise InputError(f"last is {last!r}; expected 'row' or 'column': which of the two sums are exact")
    steps = as_count(steps, name="steps")
    xp, logs = square(logits, name="logits")
    # In logarithms, with the largest taken out before exp: logits of ±900 are no float64 numbers as exponentials.
    order = (-2, -1) if last == "row" else (-1, -2)
    for _ in range(steps):
        for axis in order:
            top = xp.max(logs, axis=axis, keepdims=True)
            logs = logs - top
            logs = logs - xp.log(xp.sum(xp.exp(logs), axis=axis, keepdims=True))
    return xp.exp(logs)


class Violation(NamedTuple):
    """How far a matrix is from doubly stochastic, cause by cause."""

    row: Array  # (...), max_i |Σ_j P_ij − 1|
    column: Array  # (...), max_j |Σ_i P_ij − 1|
    negativity: Array  # (...), size of the most negative entry, 0 if none


def doubly_stochastic_violation(p: Array) -> Violation:
    """Doubly-stochastic violation: row error, column error and negativity, separately.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Violation
        row, column and negativity, (...) each; all zero for a doubly stochastic matrix.

    Examples
    --------
    >>> found = doubly_stochastic_violation([[1.0, 0.0], [0.5, 0.5]])
    >>> float(found.row), float(found.column), float(found.negativity)
    (0.0, 0.5, 0.0)
    """
    xp, p = square(p)
    row = xp.max(xp.abs(xp.sum(p, axis=-1) - 1.0), axis=-1)
    column = xp.max(xp.abs(xp.sum(p, axis=-2) - 1.0), axis=-1)
    return Violation(row, column, xp.max(xp.where(p < 0, -p, xp.zeros_like(p)), axis=(-2, -1)))


def identity_distance(p: Array) -> Array:
    """Distance from the identity ‖A − I‖_F / √n: near 0 the streams do not mix.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Array
        (...).

    Examples
    --------
    >>> float(identity_distance([[0.0, 1.0], [1.0, 0.0]]).round(12)) == round(2**0.5, 12)
    True
    """
    xp, p = square(p)
    return xp.sqrt(xp.sum((p - identity(xp, p)) ** 2, axis=(-2, -1)) / p.shape[-1])
