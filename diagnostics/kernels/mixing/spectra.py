"""Which directions of the streams grow or fade? Eigenvalues, gap, condition, departure from normality."""

from depthscope.diagnostics.kernels._arrays import Array
from depthscope.diagnostics.kernels.mixing._matrices import square


def eigenvalues(p: Array) -> Array:
    """Eigenvalues, complex, in descending order of magnitude.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Array
        (..., n), complex128.

    Examples
    --------
    >>> eigenvalues([[0.5, 0.5], [0.5, 0.5]]).real.round(12).tolist()
    [1.0, 0.0]
    """
    xp, p = square(p)
    # numpy returns real numbers where all eigenvalues are: always complex here, and an order that does not depend on it.
    values = xp.astype(xp.linalg.eigvals(p), xp.complex128)
    return xp.take_along_axis(values, xp.argsort(-xp.abs(values), axis=-1, stable=True), axis=-1)


def spectral_gap(p: Array) -> Array:
    """Spectral gap 1 − |λ₂|: how fast streams become equal under repeated mixing.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Array
        (...); NaN for a single stream.

    Examples
    --------
    >>> float(spectral_gap([[0.75, 0.25], [0.25, 0.75]]).round(12))
    0.5
    """
    xp, p = square(p)
    if p.shape[-1] == 1:
        return xp.full_like(p[..., 0, 0], xp.nan)
    return 1.0 - xp.abs(eigenvalues(p)[..., 1])
