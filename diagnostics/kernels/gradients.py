"""How large is a gradient, and how far apart are the values of a channel? Norm, and variance of channels.

Shapes: ``...`` batch, ``N`` rows (tokens or samples), ``d`` columns (features or parameters).
"""

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


def channel_variance(x: Array, *, mask: Array | None = None) -> Array:
    """Average channel variance, of a signal-propagation plot.

    Parameters
    ----------
    x
        States (..., N, d): the variance of each of the d channels runs over the N rows.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        (...), in squared units of ``x``. Source: Brock et al. 2101.08692.

    Examples
    --------
    >>> import numpy as np
    >>> float(channel_variance(np.array([[1.0, 0.0], [3.0, 0.0]])))
    0.5
    """
    # From centred rows: mean of squares less squared mean would cancel for channels with large means.
    centred = rows(x, mask=mask, center=True)
    xp = centred.xp
    count = centred.count[..., None] + xp.zeros_like(centred.values[..., 0, :])
    return xp.mean(ratio(xp, xp.sum(centred.values**2, axis=-2), count), axis=-1)
