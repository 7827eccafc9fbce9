"""Which activations are massive, and which tokens have them? Thresholds by size and by the median.

Shapes: ``...`` batch, ``N`` rows (tokens), ``d`` columns (features).
"""

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from depthscope.diagnostics.kernels._arrays import Array, rows


def massive_activations(
    x: Array, *, absolute: float = 100.0, relative: float = 1000.0, mask: Array | None = None
) -> Array:
    """Which entries are massive: magnitude above ``absolute`` and above ``relative`` × the matrix's median.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    absolute
        Smallest magnitude, in the units of ``x``.
    relative
        Smallest multiple of the median magnitude, of the entries that are not zero, over the rows that count.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        Booleans (..., N, d), False in masked rows. Source: Sun et al. 2402.17762.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.full((3, 2), 0.1)
    >>> x[1, 0] = -500.0
    >>> massive_activations(x).tolist()
    [[False, False], [True, False], [False, False]]
    """
    matrix = rows(x, mask=mask)
    xp = matrix.xp
    size = xp.abs(matrix.values)
    large = size > absolute
    # The median needs a sort of all entries: most states have no entry above the absolute threshold.
    if not bool(xp.any(large)):
        return large
    return large & (size > relative * _median_entry(xp, size, matrix.mask)[..., None, None])


def _median_entry(xp: Any, size: Array, mask: Array | None) -> Array:
    """The median over the entries that are not zero of the rows that count, (...): after a ReLU most are zero."""
    counted = size > 0
    if mask is not None:
        counted = counted & mask[..., None]
    # Entries that do not count are sorted behind all others, and the number of entries leaves them out.
    size = xp.where(counted, size, xp.full_like(size, xp.inf))
    flat = xp.reshape(size, (*size.shape[:-2], -1))
    entries = xp.sum(xp.astype(counted, xp.int64), axis=(-2, -1))
    # The two middle entries, which are one for an odd number.
    pair = xp.clip(xp.stack([(entries - 1) // 2, entries // 2], axis=-1), min=0, max=flat.shape[-1] - 1)
    # A sort of all entries takes an eighth of the analysis of a language model; only numpy has less.
    of_numpy = isinstance(flat, np.ndarray)
    ordered = np.partition(flat, np.unique(pair), axis=-1) if of_numpy else xp.sort(flat, axis=-1)
    return xp.mean(xp.take_along_axis(ordered, pair, axis=-1), axis=-1)


def massive_tokens(
    x: Array, *, absolute: float = 100.0, relative: float = 1000.0, mask: Array | None = None
) -> Array:
    """Which tokens have a massive activation; any kernel takes ``mask=~massive_tokens(x)`` to ignore them.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    absolute
        Smallest magnitude, in the units of ``x``.
    relative
        Smallest multiple of the median magnitude.
    mask
        Booleans (..., N), False for rows that do not count.

    Returns
    -------
    Array
        Booleans (..., N). Source: Sun et al. 2402.17762.

    Examples
    --------
    >>> import numpy as np
    >>> massive_tokens(np.array([[0.1, 0.1], [0.1, 200.0], [0.1, 0.1]])).tolist()
    [False, True, False]
    """
    massive = massive_activations(x, absolute=absolute, relative=relative, mask=mask)
    return array_namespace(massive).any(massive, axis=-1)
