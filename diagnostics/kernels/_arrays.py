"""Numpy arrays and torch tensors seen alike: namespace, float64, row masks, centring, Gram matrices.

Shapes: ``...`` batch, ``N`` rows (tokens), ``d`` columns (features).
"""

from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj

Array = Any
"""A numpy array or a torch tensor."""


class Rows(NamedTuple):
    """A batch of matrices, ready to compute on: float64, finite, and zero in the rows that do not count."""

    xp: Any
    values: Array  # (..., N, d)
    mask: Array | None  # (..., N), True where the row counts; None when all do
    count: Array  # (...), how many rows count


def as_array(x: Array) -> Array:
    """The array itself, cut off from any autograd graph; lists and numbers become numpy arrays."""
    if not is_array_api_obj(x):
        return np.asarray(x)
    return x.detach() if hasattr(x, "detach") else x


def as_float64(x: Array, *, name: str = "x", ndim: int = 1) -> tuple[Any, Array]:
    """The namespace of ``x`` and ``x`` in float64, refused below ``ndim`` dims, when empty or not finite."""
    xp, x = upcast(x, name=name, ndim=ndim)
    require_finite(xp, x, name)
    return xp, x


def upcast(x: Array, *, name: str, ndim: int) -> tuple[Any, Array]:
    """The namespace of ``x`` and ``x`` in float64, its shape checked and its values not."""
    x = as_array(x)
    if x.ndim < ndim or 0 in x.shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; expected at least {ndim} dims, none of them empty: "
            "the last dims are the matrix or vector, leading dims are batch"
        )
    xp = array_namespace(x)
    return xp, xp.astype(x, xp.float64, copy=False)


def require_finite(xp: Any, x: Array, name: str) -> None:
    """Refuse NaN and infinities, saying how many there are and where the first one is."""
    finite = xp.isfinite(x)
    if bool(xp.all(finite)):
        return
    places = [int(axis[0]) for axis in xp.nonzero(~finite)]
    raise ValueError(
        f"{name} holds {int(xp.sum(xp.astype(~finite, xp.int64)))} NaN or infinite values of "
        f"{finite.size if isinstance(finite, np.ndarray) else finite.numel()}, the first at index "
        f"{tuple(places)}; expected finite numbers: mask those rows out with mask=, or find what made them"
    )


def row_mask(xp: Any, x: Array, mask: Array | None) -> Array | None:
    """The mask broadcast to the rows of ``x``: boolean, (..., N)."""
    if mask is None:
        return None
    mask = xp.asarray(mask, device=device(x))
    if mask.dtype != xp.bool:
        raise ValueError(
            f"mask has dtype {mask.dtype}; expected booleans, True where a row counts: pass mask != 0"
        )
    try:
        return xp.broadcast_to(mask, x.shape[:-1])
    except (ValueError, RuntimeError):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; expected one for the rows {tuple(x.shape[:-1])}"
        ) from None


def rows(x: Array, *, mask: Array | None = None, center: bool = False, name: str = "x") -> Rows:
    """A batch of matrices in float64, finite, masked rows zero, the mean row removed if asked.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    mask
        Booleans that broadcast to (..., N); a row that is False is as if absent, whatever it holds.
    center
        Remove the mean of the rows that count.
    name
        What errors call ``x``.

    Returns
    -------
    Rows
        The namespace, the values, the mask and the number of rows that count.
    """
    xp, x = upcast(x, name=name, ndim=2)
    mask = row_mask(xp, x, mask)
    if mask is None:
        count = xp.full(x.shape[:-2], float(x.shape[-2]), dtype=xp.float64, device=device(x))
    else:
        x = xp.where(mask[..., None], x, xp.zeros_like(x))
        count = xp.sum(xp.astype(mask, xp.float64), axis=-1)
    require_finite(xp, x, name)
    return Rows(xp, _centered(xp, x, mask, count) if center else x, mask, count)


def _centered(xp: Any, x: Array, mask: Array | None, count: Array) -> Array:
    """Rows less their mean, exactly zero where the rows are equal and accurate under any common offset."""
    if mask is None:
        shifted = x - x[..., :1, :]
        return shifted - xp.mean(shifted, axis=-2, keepdims=True)
    weight = xp.astype(mask, xp.float64)[..., None]
    first = weight * xp.astype(xp.cumulative_sum(weight, axis=-2) == 1, xp.float64)
    shifted = weight * (x - xp.sum(first * x, axis=-2, keepdims=True))
    mean = xp.sum(shifted, axis=-2, keepdims=True) / xp.clip(count, min=1.0)[..., None, None]
    return weight * (shifted - mean)


def peak(xp: Any, x: Array, axis: Any = (-2, -1)) -> Array:
    """The largest magnitude along ``axis``, dims kept; 1 where all is zero, so that it divides."""
    top = xp.max(xp.abs(x), axis=axis, keepdims=True)
    return xp.where(top > 0, top, xp.ones_like(top))


def gram(xp: Any, x: Array) -> Array:
    """The Gram matrix on the smaller side: X Xᵀ when N ≤ d, else XᵀX."""
    xt = xp.matrix_transpose(x)
    return x @ xt if x.shape[-2] <= x.shape[-1] else xt @ x


def unit_rows(xp: Any, x: Array) -> tuple[Array, Array]:
    """Rows at length 1 (zero rows stay zero) and the lengths (...,), safe against over- and underflow."""
    top = peak(xp, x, axis=-1)
    scaled = x / top
    length = xp.sqrt(xp.sum(scaled * scaled, axis=-1, keepdims=True))
    unit = scaled / xp.where(length > 0, length, xp.ones_like(length))
    return unit, (top * length)[..., 0]


def ratio(xp: Any, over: Array, under: Array) -> Array:
    """``over / under``, NaN where ``under`` is zero."""
    safe = xp.where(under == 0, xp.ones_like(under), under)
    return xp.where(under == 0, xp.full_like(under, xp.nan), over / safe)


def masked_mean(xp: Any, values: Array, keep: Array, axis: int = -1) -> Array:
    """The mean of ``values`` where ``keep``, NaN where nothing is kept."""
    kept = xp.where(keep, values, xp.zeros_like(values))
    return ratio(xp, xp.sum(kept, axis=axis), xp.sum(xp.astype(keep, xp.float64), axis=axis))


def selected(x: Rows) -> list[Array]:
    """The matrices of a batch one by one, (rows that count, d), for what does not batch."""
    flat = x.xp.reshape(x.values, (-1, *x.values.shape[-2:]))
    if x.mask is None:
        return [flat[i] for i in range(flat.shape[0])]
    mask = x.xp.reshape(x.mask, (-1, x.mask.shape[-1]))
    return [flat[i][mask[i]] for i in range(flat.shape[0])]
