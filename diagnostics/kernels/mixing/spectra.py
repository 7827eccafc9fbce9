"""Which directions of the streams grow or fade? Eigenvalues, gap, condition, departure from normality."""

from depthscope.diagnostics.kernels._arrays import Array, peak
from depthscope.diagnostics.kernels.mixing._matrices import square
from depthscope.diagnostics.kernels.mixing.singular import singular_values
from depthscope.diagnostics.kernels.rank import condition_of


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


def condition_number(p: Array) -> Array:
    """Condition number σ_max/σ_min.

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Array
        (...), at least 1; infinite when singular, NaN for a zero matrix.

    Examples
    --------
    >>> float(condition_number([[4.0, 0.0], [0.0, 2.0]]))
    2.0
    """
    return condition_of(singular_values(p))


def henrici(p: Array) -> Array:
    """Henrici's departure from normality √(‖A‖_F² − Σ|λ|²).

    Parameters
    ----------
    p
        Matrices (..., n, n).

    Returns
    -------
    Array
        (...); 0 for a normal matrix: a difference within rounding, 8 n ε ‖A‖_F², counts as zero.

    Examples
    --------
    >>> float(henrici([[1.0, 2.0], [0.0, 1.0]]).round(9))
    2.0
    """
    xp, p = square(p)
    scale = peak(xp, p)
    size = xp.sum((p / scale) ** 2, axis=(-2, -1))
    excess = size - xp.sum(xp.abs(eigenvalues(p / scale)) ** 2, axis=-1)
    # Both sums have errors of a few n ε ‖A‖²; under a root, 1e-16 would become a departure of 1e-8. The factor 8 is ours.
    rounding = 8.0 * p.shape[-1] * xp.finfo(xp.float64).eps * size
    return scale[..., 0, 0] * xp.sqrt(xp.where(excess > rounding, excess, xp.zeros_like(excess)))
