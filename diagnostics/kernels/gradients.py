"""How large is the gradient, how noisy, and do samples agree? Norms, noise scale, signal-propagation plots.

Shapes: ``...`` batch, ``N`` rows (tokens or samples), ``d`` columns (features or parameters).
"""

from typing import NamedTuple

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array, as_float64, peak, ratio, rows
from depthscope.diagnostics.kernels.geometry import token_cosine


def gradient_norm(g: Array, *, rms: bool = False, mask: Array | None = None) -> Array:
    """Gradient norm ‖g‖₂ over the last two dims, or its root mean square per entry.

    Parameters
    ----------
    g
        Gradients (..., N, d).
    rms
        Divide by √(rows that count × d).
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), in the units of ``g``; a zero gradient gives 0, no rows at all give NaN with ``rms``.

    Examples
    --------
    >>> import numpy as np
    >>> g = np.array([[3.0, 0.0], [0.0, 4.0]])
    >>> float(gradient_norm(g)), float(gradient_norm(g, rms=True))
    (5.0, 2.5)
    """
    matrix = rows(g, mask=mask, name="g")
    xp = matrix.xp
    # Divided by the largest entry: squares of gradients of 1e-160, or of an explosion, are no float64 numbers.
    scale = peak(xp, matrix.values)
    square = xp.sum((matrix.values / scale) ** 2, axis=(-2, -1))
    if rms:
        square = ratio(xp, square, matrix.count * float(matrix.values.shape[-1]))
    return xp.sqrt(square) * scale[..., 0, 0]


def backward_gain_profile(norms: Array) -> Array:
    """Backward gain by depth: ‖δ_l‖ / ‖δ_L‖ along the first axis, the last entry being the output.

    Parameters
    ----------
    norms
        Gradient norms (L, ...), from the input to the output.

    Returns
    -------
    Array
        (L, ...), 1 at the output; NaN where the output's gradient is zero.

    Examples
    --------
    >>> backward_gain_profile([6.0, 3.0, 2.0]).tolist()
    [3.0, 1.5, 1.0]
    """
    xp, norms = as_float64(norms, name="norms")
    return ratio(xp, norms, xp.broadcast_to(norms[-1:], norms.shape))


class NoiseScale(NamedTuple):
    """The simple gradient noise scale, and the two unbiased estimates of which it is the ratio."""

    scale: Array  # tr(Σ)/|G|², in samples; negative or NaN where |G|² is not resolved
    trace: Array  # tr(Σ), the variance of one sample's gradient
    square: Array  # |G|², the squared norm of the true gradient


def noise_scale(small: Array, large: Array, *, batch_small: int, batch_large: int) -> NoiseScale:
    """Gradient noise scale B = tr(Σ)/|G|² from gradient norms at two batch sizes.

    |G|² ≈ (B_l ‖g_l‖² − B_s ‖g_s‖²)/(B_l − B_s) and tr(Σ) ≈ (‖g_s‖² − ‖g_l‖²)/(1/B_s − 1/B_l), both
    unbiased. Their ratio is not: average both over steps before dividing.

    Parameters
    ----------
    small, large
        Gradient norms (not squared), any shape, of a small and a large batch (mean-reduced loss).
    batch_small, batch_large
        Samples in each.

    Returns
    -------
    NoiseScale
        scale in samples, trace and square in squared units of the gradient.
        Source: McCandlish et al. 1812.06162.

    Raises
    ------
    InputError
        If the sizes are not 0 < batch_small < batch_large or a norm is not finite.

    Examples
    --------
    A true gradient of 1 with variance 4: ‖g‖² is 1 + 4/B.

    >>> found = noise_scale(3.0**0.5, 1.5**0.5, batch_small=2, batch_large=8)
    >>> round(float(found.scale), 9), round(float(found.square), 9)
    (4.0, 1.0)
    """
    if not 0 < batch_small < batch_large:
        raise InputError(f"batch sizes are {batch_small} and {batch_large}; expected 0 < small < large")
    xp, low = as_float64(small, name="small", ndim=0)
    _, high = as_float64(large, name="large", ndim=0)
    # E‖g_B‖² = |G|² + tr(Σ)/B: two batch sizes give two equations in two unknowns.
    square = (batch_large * high**2 - batch_small * low**2) / (batch_large - batch_small)
    trace = (low**2 - high**2) / (1.0 / batch_small - 1.0 / batch_large)
    square, trace = xp.asarray(square), xp.asarray(trace)
    return NoiseScale(ratio(xp, trace, square), trace, square)


def cosine_across_samples(g: Array, *, mask: Array | None = None) -> Array:
    """Mean cosine between the gradients of different samples: 1 when all agree, about 0 when none do.

    Parameters
    ----------
    g
        Per-sample gradients (..., N, d).
    mask
        Booleans (..., N), False for samples that do not count.

    Returns
    -------
    Array
        (...); zero gradients do not count, NaN with fewer than two others.

    Examples
    --------
    >>> import numpy as np
    >>> float(cosine_across_samples(np.array([[1.0, 0.0], [-2.0, 0.0]])))
    -1.0
    """
    return token_cosine(g, mask=mask)


class SignalPropagation(NamedTuple):
    """The two values of a signal-propagation plot at one depth."""

    squared_mean: Array  # (...), average over channels of the squared mean
    variance: Array  # (...), average over channels of the variance


def signal_propagation(x: Array, *, mask: Array | None = None) -> SignalPropagation:
    """Signal-propagation plot: average channel squared mean and average channel variance.

    Parameters
    ----------
    x
        States (..., N, d): the statistics of each of the d channels run over the N rows.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    SignalPropagation
        squared_mean and variance (...), in squared units of ``x``. Source: Brock et al. 2101.08692.

    Examples
    --------
    >>> import numpy as np
    >>> found = signal_propagation(np.array([[1.0, 0.0], [3.0, 0.0]]))
    >>> float(found.squared_mean), float(found.variance)
    (2.0, 0.5)
    """
    # The variance from centred rows: mean of squares less squared mean would cancel for channels with large means.
    plain, centred = rows(x, mask=mask), rows(x, mask=mask, center=True)
    xp = plain.xp
    count = plain.count[..., None] + xp.zeros_like(plain.values[..., 0, :])
    mean = ratio(xp, xp.sum(plain.values, axis=-2), count)
    variance = ratio(xp, xp.sum(centred.values**2, axis=-2), count)
    return SignalPropagation(xp.mean(mean * mean, axis=-1), xp.mean(variance, axis=-1))
