"""How fast does the variance decrease from direction to direction? The power law of a spectrum (α-ReQ).

Shapes: ``...`` batch, ``N`` rows (tokens), ``d`` columns (features), ``k`` singular values.
"""

from typing import Any, NamedTuple

from array_api_compat import device

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array, as_array, as_float64, ratio
from depthscope.diagnostics.kernels.rank import singular_values

# Singular values below this share of the largest are the rounding of a matrix of lower rank (some 1e-16 to 1e-14 of σ₁):
# a fit in logarithms would give each of them the weight of a true value.
ROUNDING = 1e-12


class PowerLaw(NamedTuple):
    """A power law λ_i ∝ i^(−alpha) fitted to a spectrum by weighted least squares in log-log."""

    alpha: Array  # (...), the exponent; NaN where fewer than three values are fitted
    error: Array  # (...), its standard error
    residual: Array  # (...), root mean square of the misfit in ln λ
    first: int  # the first index fitted, counted from 1
    last: Array  # (...), the last one


def alpha_req_of(s: Array, *, first: int = 4, last: int | None = 100) -> PowerLaw:
    """Power-law exponent α of a spectrum: σ_i² ∝ i^(−α) over first ≤ i ≤ last, fitted with weights 1/i.

    The range and the weights are those of the authors' code: equal steps of ln i have equal weight.

    Parameters
    ----------
    s
        Singular values (..., k), descending.
    first
        The first index that is fitted, counted from 1 (the leading ones are rarely on the law).
    last
        The last index; reduced to the values above rounding, all of them for ``None``.

    Returns
    -------
    PowerLaw
        The exponent, its standard error, the misfit and the range. Source: Agrawal et al., NeurIPS 2022.

    Raises
    ------
    InputError
        If the range is empty.

    Examples
    --------
    >>> import numpy as np
    >>> fit = alpha_req_of(1.0 / np.arange(1.0, 101.0), first=5)
    >>> float(fit.alpha.round(9)), int(fit.last)
    (2.0, 100)
    """
    if first < 1 or (last is not None and last <= first):
        raise InputError(f"the range is {first} to {last}; expected 1 ≤ first < last, indices counted from 1")
    xp, s = as_float64(s, name="s")
    index = xp.arange(1, s.shape[-1] + 1, dtype=xp.float64, device=device(s))
    fitted = (
        (s > ROUNDING * xp.max(s, axis=-1, keepdims=True))
        & (index >= first)
        & (index <= (last or s.shape[-1]))
    )
    # ln λ = 2 ln σ; values outside the range are replaced by 1, for ln 0 would give NaN in the sums.
    logs = 2.0 * xp.log(xp.where(fitted, s, xp.ones_like(s)))
    steps = xp.broadcast_to(xp.log(index), s.shape)
    last_fitted = xp.max(xp.where(fitted, index, xp.zeros_like(s)), axis=-1)
    weights = xp.where(fitted, 1.0 / index, xp.zeros_like(s))
    return PowerLaw(*_fit_line(xp, steps, logs, weights), first, xp.astype(last_fitted, xp.int64))


def _fit_line(xp: Any, t: Array, y: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Weighted least squares y = c − αt: α, its standard error, the root mean square misfit; weight 0 is not fitted."""
    count = xp.sum(xp.astype(weights > 0, xp.float64), axis=-1)
    total = xp.sum(weights, axis=-1)
    dt = t - ratio(xp, xp.sum(weights * t, axis=-1), total)[..., None]
    dy = y - ratio(xp, xp.sum(weights * y, axis=-1), total)[..., None]
    # Where nothing is fitted the means are NaN, which a weight of 0 would not undo.
    dt, dy = (xp.where(weights > 0, each, xp.zeros_like(each)) for each in (dt, dy))
    enough = count >= 3  # two points leave no degree of freedom for the error; a spread of 0 then makes α NaN
    spread = xp.where(enough, xp.sum(weights * dt * dt, axis=-1), xp.zeros_like(count))
    alpha = -ratio(xp, xp.sum(weights * dt * dy, axis=-1), spread)
    misfit = xp.sum(weights * (dy + alpha[..., None] * dt) ** 2, axis=-1)
    error = xp.sqrt(ratio(xp, misfit, xp.where(enough, count - 2.0, 0.0 * count) * spread))
    return alpha, error, xp.sqrt(ratio(xp, misfit, total))


def alpha_req(
    x: Array,
    *,
    first: int = 4,
    last: int | None = 100,
    center: bool = True,
    mask: Array | None = None,
) -> PowerLaw:
    """α-ReQ: power-law exponent of the covariance eigenvalues, λ_i ∝ i^(−α) over first ≤ i ≤ last, with weights 1/i.

    Parameters
    ----------
    x
        Matrices (..., N, d); a single spectrum (k,) of singular values is fitted as it is.
    first, last
        The range of indices, counted from 1; reduced to the eigenvalues above rounding.
    center
        Remove the mean row first (a covariance; the default).
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    PowerLaw
        The exponent, its standard error, the misfit and the range. Source: Agrawal et al., NeurIPS 2022.

    Raises
    ------
    InputError
        If the range is empty.

    Examples
    --------
    >>> import numpy as np
    >>> float(alpha_req(np.diag(1.0 / np.arange(1.0, 33.0)), first=4, center=False).alpha.round(9))
    2.0
    """
    x = as_array(x)
    s = x if x.ndim == 1 else singular_values(x, center=center, mask=mask)
    return alpha_req_of(s, first=first, last=last)
