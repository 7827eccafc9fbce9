"""Which constraint do mixing matrices satisfy? The error of each property, and the most specific one that all have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from array_api_compat import device

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array
from depthscope.diagnostics.kernels.mixing._matrices import identity, square
from depthscope.diagnostics.kernels.mixing.stochastic import doubly_stochastic_violation
from depthscope.diagnostics.numbers import number

EXACT = 1e-5
"""Up to this error an entry counts as 0, 1, 1/n or equal to another one: float32 rounds sums of some numbers to 1e-6."""

# The limit from which the verdict on Sinkhorn fails: a larger error is no truncation but another constraint. Heuristic.
TRUNCATED = 0.1

# An error has to be this small against what separates the matrices from a I + b J, where rows and columns behave the same
# whatever is constrained: near its initial identity a free matrix has sums near 1 too. Heuristic.
CLEAR = 0.1

# Names of matrices that satisfy several constraints at once, so that none of them can be inferred.
POINTS = ("zero", "identity", "all ones", "uniform", "permutation")

SIGNED = "rows and columns sum to 1, with negative entries,"

_AS_AT_START = {
    "identity": "identity (as at initialisation), so nothing more can be inferred",
    "uniform": "uniform, every weight 1/n (as zero logits give at initialisation), so nothing more can be inferred",
    "zero": "zero: the next state keeps nothing of the streams",
    "all ones": "all ones: every stream becomes the sum of all of them",
    "permutation": "permutation: the streams change places and do not mix",
}


@dataclass(frozen=True)
class Constraint:
    """What a stack of matrices satisfies, as measured.

    Parameters
    ----------
    name : str
        The most specific property that holds for every matrix, such as ``"doubly stochastic"``; ``"unconstrained"`` for none.
    error : float
        Its largest error over all matrices.
    tolerance : float
        Up to which it counts as holding.
    trivial : bool
        Whether the matrices are so special, as at initialisation, that several constraints hold and none can be inferred.
    also : tuple of str
        Further structure that the name does not imply: circulant, symmetric, a Kronecker product, rank 1.
    errors : mapping of str to float
        The largest error of every property that was measured.
    """

    name: str
    error: float
    tolerance: float
    trivial: bool
    also: tuple[str, ...]
    errors: Mapping[str, float]

    @property
    def words(self) -> str:
        """The constraint as people read it, such as ``doubly stochastic within 1e-7, circulant``."""
        if self.name in _AS_AT_START:
            return _AS_AT_START[self.name]
        words = "".join([self._base(), *(f", {structure}" for structure in self.also)])
        if self.trivial:
            words += "; all weights off the diagonal are equal (as at initialisation), so nothing more can be inferred"
        return words

    def _base(self) -> str:
        rows, columns = self.errors["row sums"], self.errors["column sums"]
        if self.name == "doubly stochastic" and max(rows, columns) > self.tolerance:
            return f"doubly stochastic but for truncation: rows {_within(rows)}, columns {_within(columns)}"
        if self.name == "row-stochastic only":
            return f"row-stochastic only: rows {_within(rows)}, column sums miss 1 by up to {columns:.2g}"
        if self.name == "column-stochastic only":
            return f"column-stochastic only: columns {_within(columns)}, row sums miss 1 by up to {rows:.2g}"
        if self.name in ("unconstrained", "non-negative", "substochastic"):
            return f"{self.name}: row sums miss 1 by up to {rows:.2g}, column sums by up to {columns:.2g}"
        return f"{self.name} {_within(self.error)}"


def _within(error: float) -> str:
    return f"within {number(error, digits=1)}" if error else "exactly"


def constraint_errors(p: Array) -> dict[str, Array]:
    """How far each matrix is from every property: the largest deviation of an entry or a sum.

    With rows r, columns c, J the matrix of ones: ``row sums`` max |Σ_c P_rc − 1|, ``column sums`` max |Σ_r P_rc − 1|,
    ``negativity`` −min P or 0, ``excess`` the largest sum above 1, ``zero`` max |P|, ``identity`` max |P − I|, ``all ones``
    max |P − J|, ``uniform`` max |P − J/n|, ``diagonal`` the largest entry off the diagonal, ``permutation`` the distance from
    entries of 0 and 1, and from one 1 in each row and column, ``orthogonal`` max |PᵀP − I|, ``symmetric`` max |P − Pᵀ|,
    ``circulant`` the spread along diagonals that wrap around, ``rank 1`` the distance from the outer product of the row and
    column of the largest entry, ``a Kronecker product`` the same of its blocks as rows (infinite for a prime n).

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    dict of str to Array
        (...) each.

    Examples
    --------
    >>> found = constraint_errors([[0.75, 0.25], [0.25, 0.75]])
    >>> [float(found[name]) for name in ("row sums", "column sums", "identity", "uniform")]
    [0.0, 0.0, 0.25, 0.25]
    """
    xp, p = square(p)
    n, one = p.shape[-1], identity(xp, p)
    violation = doubly_stochastic_violation(p)
    sums = xp.maximum(xp.max(xp.sum(p, axis=-1), axis=-1), xp.max(xp.sum(p, axis=-2), axis=-1))
    nearest = xp.where(p > 0.5, xp.ones_like(p), xp.zeros_like(p))
    misplaced = doubly_stochastic_violation(nearest)
    return {
        "row sums": violation.row,
        "column sums": violation.column,
        "negativity": violation.negativity,
        "excess": xp.clip(sums - 1.0, min=0.0),
        "zero": _largest(xp, p),
        "identity": _largest(xp, p - one),
        "all ones": _largest(xp, p - 1.0),
        "uniform": _largest(xp, p - 1.0 / n),
        "diagonal": _largest(xp, p * (1.0 - one)),
        "permutation": _largest(xp, p - nearest) + misplaced.row + misplaced.column,
        "orthogonal": _largest(xp, xp.matrix_transpose(p) @ p - one),
        "symmetric": _largest(xp, p - xp.matrix_transpose(p)),
        "circulant": _wrapped_spread(xp, p),
        "rank 1": _outer_distance(xp, p),
        "a Kronecker product": _kronecker_distance(xp, p),
    }


def _largest(xp: Any, x: Array) -> Array:
    return xp.max(xp.abs(x), axis=(-2, -1))


def _outer_distance(xp: Any, p: Array) -> Array:
    """Largest entry of P − c rᵀ / P_ij, with the row r and the column c of the largest entry P_ij: 0 for rank one."""
    rows, columns = p.shape[-2:]
    top = xp.argmax(xp.reshape(xp.abs(p), (*p.shape[:-2], rows * columns)), axis=-1)[..., None]
    # Products with one-hot vectors, as the array API has no gather that both numpy and torch know.
    at_row = xp.astype(xp.arange(rows, device=device(p)) == top // columns, p.dtype)
    at_column = xp.astype(xp.arange(columns, device=device(p)) == top % columns, p.dtype)
    row, column = xp.sum(p * at_row[..., None], axis=-2), xp.sum(p * at_column[..., None, :], axis=-1)
    pivot = xp.sum(row * at_column, axis=-1)
    pivot = xp.where(pivot == 0, xp.ones_like(pivot), pivot)
    return _largest(xp, p - column[..., :, None] * row[..., None, :] / pivot[..., None, None])


def _wrapped_spread(xp: Any, p: Array) -> Array:
    """Largest distance of an entry from the mean of its diagonal (j − i) mod n."""
    n = p.shape[-1]
    # Row i moved left by i: the diagonals that wrap around become columns.
    rows = [xp.roll(p[..., i, :], -i, axis=-1) for i in range(n)]
    moved = xp.stack(rows, axis=-2)
    return _largest(xp, moved - xp.mean(moved, axis=-2, keepdims=True))


def _kronecker_distance(xp: Any, p: Array) -> Array:
    """Distance from A ⊗ B with A (a × a), B (b × b) and a b = n, the least over all such sizes."""
    n = p.shape[-1]
    found = xp.full_like(p[..., 0, 0], xp.inf)
    for a in range(2, n):
        if n % a:
            continue
        b = n // a
        # Van Loan and Pitsianis 1993: with the blocks as rows, a Kronecker product has rank one.
        blocks = xp.reshape(p, (*p.shape[:-2], a, b, a, b))
        lead = tuple(range(p.ndim - 2))
        order = (*lead, *(len(lead) + axis for axis in (0, 2, 1, 3)))
        rows = xp.reshape(xp.permute_dims(blocks, order), (*p.shape[:-2], a * a, b * b))
        found = xp.minimum(found, _outer_distance(xp, rows))
    return found


def named_constraint(p: Array, *, tolerance: float = EXACT) -> Constraint:
    """The most specific constraint that every matrix of a stack satisfies.

    What holds is a statement about these matrices, not about the code that made them: a mixture of permutations is any doubly
    stochastic matrix (Birkhoff), and is named so. A property near the identity, where free matrices have it too, is not named:
    its error must be a tenth of what separates the matrices from a single a I + b J.

    Parameters
    ----------
    p
        Matrices (..., n, n), n ≥ 2, of all tokens and connections.
    tolerance
        Up to which error a sum, a symmetry or a norm counts as exact: what the precision rounds.

    Returns
    -------
    Constraint

    Raises
    ------
    InputError
        For a single stream.

    Examples
    --------
    >>> named_constraint([[[0.6, 0.3, 0.1], [0.1, 0.6, 0.3], [0.3, 0.1, 0.6]]]).words
    'doubly stochastic within 1e-16, circulant'
    >>> named_constraint([[1.0, 0.0], [0.0, 1.0]]).words
    'identity (as at initialisation), so nothing more can be inferred'
    """
    xp, p = square(p)
    if p.shape[-1] < 2:
        raise InputError(f"p has shape {tuple(p.shape)}; expected matrices of two or more streams")
    errors = {name: float(xp.max(values)) for name, values in constraint_errors(p).items()}
    errors["departure"] = _departure(xp, p)
    errors["expansion"] = _expansion(xp, p)
    exact = min(tolerance, EXACT)
    name, error = _name(errors, tolerance=tolerance, exact=exact)
    trivial = name in POINTS or (errors["departure"] <= exact and name != "diagonal")
    is_plain = trivial or name == "diagonal"
    also = () if is_plain else _structure(errors, name, p.shape[-1], tolerance=tolerance, exact=exact)
    return Constraint(name, error, tolerance, trivial, also, errors)


def _departure(xp: Any, p: Array) -> float:
    """Largest distance of an entry from a I + b J with the same a and b for all matrices."""
    n, one = p.shape[-1], identity(xp, p)
    mean = xp.mean(xp.reshape(p, (-1, n, n)), axis=0)
    diagonal = xp.sum(mean * one) / n
    others = xp.sum(mean * (1.0 - one)) / (n * (n - 1))
    return float(xp.max(_largest(xp, p - diagonal * one - others * (1.0 - one))))


def _expansion(xp: Any, p: Array) -> float:
    """How far the largest singular value of any matrix is above 1, or that of its longest row where this already is."""
    longest = float(xp.max(xp.sum(p * p, axis=-1))) ** 0.5
    # No row is longer than the largest singular value: free matrices are recognised without a decomposition.
    largest = longest if longest > 1 + TRUNCATED else float(xp.max(xp.linalg.svdvals(p)))
    return max(largest - 1.0, 0.0)


def _name(errors: Mapping[str, float], *, tolerance: float, exact: float) -> tuple[str, float]:
    """The first property that holds, from the most specific on, and its error."""
    for name in (*POINTS, "diagonal"):
        if errors[name] <= exact:
            return name, errors[name]
    rows, columns, negativity = errors["row sums"], errors["column sums"], errors["negativity"]
    small = tolerance if errors["departure"] <= exact else min(tolerance, CLEAR * errors["departure"])
    sums, one_sum = max(rows, columns), min(rows, columns)
    # Of a Sinkhorn that was stopped one sum is exact, the other as far as it came.
    truncated = max(small, min(TRUNCATED, CLEAR * errors["departure"]))
    positive = negativity <= small
    held = (
        ("doubly stochastic", max(sums, negativity), positive and one_sum <= small and sums <= truncated),
        ("orthogonal", errors["orthogonal"], errors["orthogonal"] <= small),
        ("row-stochastic only", max(rows, negativity), positive and rows <= small),
        ("column-stochastic only", max(columns, negativity), positive and columns <= small),
        (SIGNED, sums, one_sum <= small and sums <= truncated),
        ("rows sum to 1, with negative entries,", rows, rows <= small),
        ("columns sum to 1, with negative entries,", columns, columns <= small),
        ("substochastic", max(errors["excess"], negativity), positive and errors["excess"] <= small),
        ("of spectral norm at most 1", errors["expansion"], errors["expansion"] <= small),
        ("non-negative", negativity, positive),
    )
    return next(((name, error) for name, error, holds in held if holds), ("unconstrained", 0.0))


def _structure(
    errors: Mapping[str, float], name: str, n: int, *, tolerance: float, exact: float
) -> tuple[str, ...]:
    """Structure that is no consequence of the name or of n."""
    # Of two streams a matrix with both sums 1 is symmetric and circulant by itself.
    if n == 2 and name in ("doubly stochastic", SIGNED):
        return ()
    small = min(max(tolerance, exact), CLEAR * errors["departure"])
    found = [each for each in ("circulant", "a Kronecker product", "rank 1") if errors[each] <= small]
    # Factors of two streams with both sums 1 are symmetric, and so is their product.
    implied = "a Kronecker product" in found and name == "doubly stochastic" and not n & (n - 1)
    if errors["symmetric"] <= small and not implied:
        found.append("symmetric")
    return tuple(found)
