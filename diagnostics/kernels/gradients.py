"""How large is the gradient, how noisy, and do samples agree? Norms, noise scale, signal-propagation plots.

Shapes: ``...`` batch, ``N`` rows (tokens or samples), ``d`` columns (features or parameters).
"""

from typing import NamedTuple

from depthscope.diagnostics.kernels._arrays import Array, peak, ratio, rows


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
