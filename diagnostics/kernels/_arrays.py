"""Numpy arrays and torch tensors seen alike: namespace, float64, row masks, centring, Gram matrices.

Shapes: ``...`` batch, ``N`` rows (tokens), ``d`` columns (features).
"""

import math
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj

Array = Any
"""A numpy array or a torch tensor."""

# Between these, fourth powers of values and their sums stay exact in float64 without scaling.
TINY, HUGE = 1e-50, 1e50

NO_MASK: Any = object()
"""What stands for the mask in a function that takes none: its errors do not advise one."""


class Rows(NamedTuple):
    """A batch of matrices, ready to compute on: float64, finite, and zero in the rows that do not count."""

    xp: Any
    values: Array  # (..., N, d)
    mask: Array | None  # (..., N), True where the row counts; None when all do
    count: Array  # (...), how many rows count
    narrow: bool  # whether they came as floats of 32 bits or fewer: fourth powers stay within float64


def as_array(x: Array, *, name: str = "x") -> Array:
    """The array itself, cut off from any autograd graph; lists and numbers become numpy arrays."""
    if not is_array_api_obj(x):
        x = np.asarray(x)
    if not _is_real(x):
        raise ValueError(f"{name} has dtype {x.dtype}; expected real numbers: {_what_to_give(x)}")
    return x.detach() if hasattr(x, "detach") else x


def _is_real(x: Array) -> bool:
    if isinstance(
        x, np.ndarray | np.generic
    ):  # what is asked of the namespace costs more than a small kernel
        return x.dtype.kind in "biuf"
    return bool(array_namespace(x).isdtype(x.dtype, ("bool", "integral", "real floating")))


def _what_to_give(x: Array) -> str:
    """Advice in place of what is not real numbers."""
    if array_namespace(x).isdtype(x.dtype, "complex floating"):
        return "take the real part, the imaginary part or the size"
    return "give numbers only, as float32 or float64"


def of_one_library(x: Array, y: Array, *, names: tuple[str, str] = ("x", "y")) -> tuple[Array, Array]:
    """Both arrays, refused where one is numpy's and the other torch's: the result could be either."""
    x, y = (as_array(side, name=name) for side, name in zip((x, y), names, strict=True))
    if type(x) is not type(y) and array_namespace(x) is not array_namespace(y):
        kinds = [f"{type(side).__module__}.{type(side).__name__}" for side in (x, y)]
        raise ValueError(
            f"{names[0]} is a {kinds[0]} and {names[1]} a {kinds[1]}; expected both of one library: "
            "convert one of them, by torch.as_tensor or numpy.asarray"
        )
    return x, y


def as_float64(x: Array, *, name: str = "x", ndim: int = 1) -> tuple[Any, Array]:
    """The namespace of ``x`` and ``x`` in float64, refused below ``ndim`` dims, when empty or not finite."""
    xp, x = checked(x, name=name, ndim=ndim)
    require_finite(xp, x, name)
    return xp, xp.astype(x, xp.float64, copy=False)


def checked(x: Array, *, name: str, ndim: int) -> tuple[Any, Array]:
    """The namespace of ``x`` and ``x`` as it came, its shape checked and its values not."""
    x = as_array(x, name=name)
    if x.ndim < ndim or 0 in x.shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; expected at least {ndim} dims, none of them empty: "
            "the last dims are the matrix or vector, leading dims are batch"
        )
    return array_namespace(x), x


def require_finite(xp: Any, x: Array, name: str, *, advice: str = "find what made them") -> None:
    """Refuse NaN and infinities, saying how many there are and where the first one is."""
    if _all_finite(xp, x):
        return
    if x.ndim == 0:
        raise ValueError(f"{name} is {float(x)}; expected a finite number: {advice}")
    wrong = xp.nonzero(~xp.isfinite(x))
    raise ValueError(
        f"{name} holds {wrong[0].shape[0]} NaN or infinite values of {math.prod(x.shape)}, the first at index "
        f"{tuple(int(axis[0]) for axis in wrong)}; expected finite numbers: {advice}"
    )


def _all_finite(xp: Any, x: Array) -> bool:
    """Whether no value is NaN or infinite: both spread to the extremes, which are cheaper than a table."""
    if not xp.isdtype(x.dtype, "real floating"):
        return True
    return bool(xp.isfinite(xp.max(x)) & xp.isfinite(xp.min(x)))


def row_mask(xp: Any, x: Array, mask: Array | None) -> Array | None:
    """The mask broadcast to the rows of ``x``: boolean, (..., N)."""
    if mask is None or mask is NO_MASK:
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


def rows(x: Array, *, mask: Array | None = NO_MASK, center: bool = False, name: str = "x") -> Rows:
    """A batch of matrices in float64, finite, masked rows zero, the mean row removed if asked.

    Parameters
    ----------
    x
        Matrices (..., N, d).
    mask
        Booleans that broadcast to (..., N); a row that is False is as if absent, whatever it holds. None where
        all rows count, left out where the function that asks takes no mask.
    center
        Remove the mean of the rows that count.
    name
        What errors call ``x``.

    Returns
    -------
    Rows
        The namespace, the values, the mask and the number of rows that count.
    """
    xp, x = checked(x, name=name, ndim=2)
    advice = "find what made them"
    if mask is not NO_MASK:
        advice = f"mask those rows out with mask=, or {advice}"
    mask = row_mask(xp, x, mask)
    if mask is None:
        count = xp.full(x.shape[:-2], float(x.shape[-2]), dtype=xp.float64, device=device(x))
    else:
        x = xp.where(mask[..., None], x, xp.zeros_like(x))
        count = xp.sum(xp.astype(mask, xp.float64), axis=-1)
    require_finite(xp, x, name, advice=advice)
    narrow = xp.isdtype(x.dtype, "real floating") and x.dtype != xp.float64
    matrix = Rows(xp, xp.astype(x, xp.float64, copy=center), mask, count, narrow)
    return _centered(matrix) if center else matrix


def _centered(matrix: Rows) -> Rows:
    """Rows less their mean, in place: exactly zero where rows are equal, accurate under any common offset."""
    xp, x, mask, count, narrow = matrix
    weight = None if mask is None else xp.astype(mask, xp.float64)[..., None]
    if not narrow:  # sums of floats of 24 bits are exact in float64, those of wider ones need a shift first
        x -= xp.asarray(_first(xp, x, weight), copy=True)
        x = x if weight is None else x * weight
    x -= xp.sum(x, axis=-2, keepdims=True) / xp.clip(count, min=1.0)[..., None, None]
    return matrix._replace(values=x if weight is None else x * weight)


def _first(xp: Any, x: Array, weight: Array | None) -> Array:
    """The first row that counts, (..., 1, d)."""
    if weight is None:
        return x[..., :1, :]
    chosen = weight * xp.astype(xp.cumulative_sum(weight, axis=-2) == 1, xp.float64)
    return xp.sum(chosen * x, axis=-2, keepdims=True)


def scaled(matrix: Rows) -> tuple[Array, Array]:
    """Values whose fourth powers stay well inside float64, and what they were divided by, (..., 1, 1)."""
    xp, values = matrix.xp, matrix.values
    if not matrix.narrow:
        top = peak(xp, values)
        if bool(xp.any((top < TINY) | (top > HUGE))):
            return values / top, top
    return values, xp.ones((*values.shape[:-2], 1, 1), dtype=xp.float64, device=device(values))


def peak(xp: Any, x: Array, axis: Any = (-2, -1)) -> Array:
    """The largest magnitude along ``axis``, dims kept; 1 where all is zero, so that it divides."""
    top = xp.max(xp.abs(x), axis=axis, keepdims=True)
    return xp.where(top > 0, top, xp.ones_like(top))


def gram(xp: Any, x: Array) -> Array:
    """The Gram matrix on the smaller side: X Xᵀ when N ≤ d, else XᵀX."""
    xt = xp.matrix_transpose(x)
    return x @ xt if x.shape[-2] <= x.shape[-1] else xt @ x


def triangle(xp: Any, tall: Array) -> Array:
    """R of the QR decomposition, for a third of the price of both."""
    if isinstance(tall, np.ndarray):
        return np.linalg.qr(tall, mode="r")
    return xp.linalg.qr(tall, mode="r")[1]


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


def row_hash(xp: Any, points: Array) -> Array:
    """64 well-mixed bits of each row: whole numbers, so that equal rows get equal ones in any order of sums."""
    bits = (points + 0.0).view(xp.int64)  # + 0.0: −0 and 0 are equal
    bits = (bits ^ (bits >> 32)) * 0x2545F4914F6CDD1D
    weight = xp.sin(xp.arange(1, points.shape[1] + 1, dtype=xp.float64, device=device(points))).view(xp.int64)
    return xp.sum((bits ^ (bits >> 29)) * weight, axis=-1)


def first_equal(xp: Any, points: Array) -> Array:
    """For each row the index of a row equal to it, (N,): the same one for all that are equal."""
    order = xp.argsort(row_hash(xp, points), stable=True)
    ordered = points[order]
    fresh = xp.concat([order[:1] >= 0, xp.any(ordered[1:] != ordered[:-1], axis=-1)])
    found = xp.zeros_like(order)
    found[order] = order[fresh][xp.cumulative_sum(xp.astype(fresh, xp.int64)) - 1]
    return found
