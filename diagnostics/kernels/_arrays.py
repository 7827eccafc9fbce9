"""What does every kernel need to run on both numpy arrays and torch tensors? Checks, masks, centring, Gram matrices.

Shapes: ``...`` batch, ``N`` rows (tokens), ``d`` columns (features).
"""

import math
import operator
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj

from depthscope.diagnostics.errors import InputError

Array = Any
"""A numpy array or a torch tensor."""

# Largest entries between these need no scaling: their fourth powers, 1e-200 to 1e200, and sums of up to 1e100 of them
# are normal float64 numbers (1e-308 to 1e308).
TINY, HUGE = 1e-50, 1e50

NO_MASK: Any = object()
"""Default of ``mask`` in `rows`, for functions without a mask argument: their errors must not advise one."""


class Rows(NamedTuple):
    """A batch of matrices, ready to compute on: float64, finite, and zero in masked rows."""

    xp: Any
    values: Array  # (..., N, d)
    mask: Array | None  # (..., N), True where the row counts; None where all rows do
    count: Array  # (...), number of rows that count
    narrow: bool  # input was float32, bfloat16 or float16: its fourth powers, up to 1e154, fit float64


def as_array(x: Array, *, name: str = "x") -> Array:
    """``x`` detached from any autograd graph; lists and numbers become numpy arrays."""
    if not is_array_api_obj(x):
        x = np.asarray(x)
    # ``isdtype`` of the namespace takes longer than a small kernel on numpy: read the dtype's kind instead.
    if isinstance(x, np.ndarray | np.generic):
        # A file's byte order: to numpy its dtype is unequal to float64, which kernels take for a narrower one.
        x = x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))
        is_real = x.dtype.kind in "biuf"
    else:
        is_real = array_namespace(x).isdtype(x.dtype, ("bool", "integral", "real floating"))
    if not is_real:
        is_complex = array_namespace(x).isdtype(x.dtype, "complex floating")
        advice = (
            "take the real part, the imaginary part or the size"
            if is_complex
            else "give numbers only, as float32 or float64"
        )
        raise InputError(f"{name} has dtype {x.dtype}; expected real numbers: {advice}")
    return x.detach() if hasattr(x, "detach") else x


def as_count(value: Any, *, name: str, least: int = 1) -> int:
    """A count (of neighbours, rounds, rows) as a Python int; refused where it is not an integer or below ``least``."""
    try:
        # operator.index takes numpy's and torch's integers, and refuses 3.0, which int() would take.
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or count < least:
        raise InputError(
            f"{name} is {value!r}; expected a whole number, {least} or more: give an int"
        ) from None
    return count


def of_one_library(x: Array, y: Array, *, names: tuple[str, str] = ("x", "y")) -> tuple[Array, Array]:
    """Both arrays; refused where one is from numpy and the other from torch: the result could be either."""
    x, y = (as_array(side, name=name) for side, name in zip((x, y), names, strict=True))
    if type(x) is not type(y) and array_namespace(x) is not array_namespace(y):
        kinds = [f"{type(side).__module__}.{type(side).__name__}" for side in (x, y)]
        raise InputError(
            f"{names[0]} is a {kinds[0]} and {names[1]} a {kinds[1]}; expected both of one library: "
            "convert one of them, by torch.as_tensor or numpy.asarray"
        )
    return x, y


def as_float64(x: Array, *, name: str = "x", ndim: int = 1) -> tuple[Any, Array]:
    """The namespace of ``x`` and ``x`` in float64; refused where it has fewer dims, is empty or not finite."""
    xp, x = checked(x, name=name, ndim=ndim)
    require_finite(xp, x, name)
    return xp, xp.astype(x, xp.float64, copy=False)


def checked(x: Array, *, name: str, ndim: int) -> tuple[Any, Array]:
    """The namespace of ``x`` and ``x`` in its own dtype; the shape is checked, the values are not."""
    x = as_array(x, name=name)
    if x.ndim < ndim or 0 in x.shape:
        raise InputError(
            f"{name} has shape {tuple(x.shape)}; expected at least {ndim} dims, none of them empty: "
            "the last dims are the matrix or vector, leading dims are batch"
        )
    return array_namespace(x), x


def require_finite(xp: Any, x: Array, name: str, *, advice: str = "find what made them") -> None:
    """Refuse NaN and infinities; the error gives their number and the index of the first."""
    if not xp.isdtype(x.dtype, "real floating"):
        return
    # NaN and infinities reach the maximum or the minimum: two reductions, and no table of booleans.
    if bool(xp.isfinite(xp.max(x)) & xp.isfinite(xp.min(x))):
        return
    if x.ndim == 0:
        raise InputError(f"{name} is {float(x)}; expected a finite number: {advice}")
    wrong = xp.nonzero(~xp.isfinite(x))
    raise InputError(
        f"{name} contains {wrong[0].shape[0]} NaN or infinite values of {math.prod(x.shape)}, the first at index "
        f"{tuple(int(axis[0]) for axis in wrong)}; expected finite numbers: {advice}"
    )


def row_mask(xp: Any, x: Array, mask: Array | None) -> Array | None:
    """The mask broadcast to the rows of ``x``: boolean, (..., N); None without a mask."""
    if mask is None or mask is NO_MASK:
        return None
    mask = xp.asarray(mask, device=device(x))
    if mask.dtype != xp.bool:
        raise InputError(
            f"mask has dtype {mask.dtype}; expected booleans, True where a row counts: pass mask != 0"
        )
    try:
        return xp.broadcast_to(mask, x.shape[:-1])
    except (ValueError, RuntimeError):
        raise InputError(
            f"mask has shape {tuple(mask.shape)}; expected one for the rows {tuple(x.shape[:-1])}"
        ) from None


def rows(x: Array, *, mask: Array | None = NO_MASK, center: bool = False, name: str = "x") -> Rows:
    """A batch of matrices in float64, checked, masked rows set to zero, the mean row removed if asked.

    ``x``: matrices (..., N, d).
    ``mask``: booleans that broadcast to (..., N); a row that is False is ignored, whatever it contains. None where
    all rows count; left out by functions without a mask argument.
    ``center``: remove the mean of the rows that count.
    ``name``: name of ``x`` in errors.
    Returns: The namespace, the values, the mask and the number of rows that count.
    """
    xp, x = checked(x, name=name, ndim=2)
    advice = "find what made them"
    if mask is not NO_MASK:
        advice = f"mask those rows out with mask=, or {advice}"
    mask = row_mask(xp, x, mask)
    # Masked rows are set to zero before the check: padding may contain NaN. Where, not a product: 0 · NaN is NaN.
    if mask is None:
        count = xp.full(x.shape[:-2], float(x.shape[-2]), dtype=xp.float64, device=device(x))
    else:
        x = xp.where(mask[..., None], x, xp.zeros_like(x))
        count = xp.sum(xp.astype(mask, xp.float64), axis=-1)
    require_finite(xp, x, name, advice=advice)
    narrow = xp.isdtype(x.dtype, "real floating") and x.dtype != xp.float64
    # Centring works in place, hence a copy.
    matrix = Rows(xp, xp.astype(x, xp.float64, copy=center), mask, count, narrow)
    return _centered(matrix) if center else matrix


def _centered(matrix: Rows) -> Rows:
    """Rows less their mean, in place: exactly zero where rows are equal, accurate under any common offset."""
    xp, x, mask, count, narrow = matrix
    weight = None if mask is None else xp.astype(mask, xp.float64)[..., None]
    if not narrow:
        # Sums of float32 values, of 24 bits, are exact in float64 for up to 2²⁹ rows of one size. Sums of float64
        # values are not: a common offset of 1e8 would leave 1e-8 of rounding, which a first row removes exactly.
        x -= xp.asarray(_first_row(xp, x, weight), copy=True)
        x = x if weight is None else x * weight
    x -= xp.sum(x, axis=-2, keepdims=True) / xp.clip(count, min=1.0)[..., None, None]
    return matrix._replace(values=x if weight is None else x * weight)


def _first_row(xp: Any, x: Array, weight: Array | None) -> Array:
    """The first row that counts, (..., 1, d)."""
    if weight is None:
        return x[..., :1, :]
    # The cumulative sum is 1 from the first row that counts to the next one; the weight leaves the first.
    chosen = weight * xp.astype(xp.cumulative_sum(weight, axis=-2) == 1, xp.float64)
    return xp.sum(chosen * x, axis=-2, keepdims=True)


def scaled(matrix: Rows) -> tuple[Array, Array]:
    """Values whose fourth powers neither overflow nor underflow, and the divisor (..., 1, 1).

    Only where needed: the division costs a pass, and rounds.
    """
    xp, values = matrix.xp, matrix.values
    if not matrix.narrow:
        top = peak(xp, values)
        if bool(xp.any((top < TINY) | (top > HUGE))):
            return values / top, top
    return values, xp.ones((*values.shape[:-2], 1, 1), dtype=xp.float64, device=device(values))


def peak(xp: Any, x: Array, axis: Any = (-2, -1)) -> Array:
    """The largest magnitude along ``axis``, dims retained; 1 where all are zero, so that it may be a divisor."""
    top = xp.max(xp.abs(x), axis=axis, keepdims=True)
    return xp.where(top > 0, top, xp.ones_like(top))


def gram(xp: Any, x: Array) -> Array:
    """The smaller Gram matrix: X Xᵀ where N ≤ d, else XᵀX. Their eigenvalues differ by zeros only."""
    xt = xp.matrix_transpose(x)
    return x @ xt if x.shape[-2] <= x.shape[-1] else xt @ x


def triangle(xp: Any, tall: Array) -> Array:
    """R of the QR decomposition, without Q: a third of the cost."""
    # The array API has no mode "r"; numpy returns R alone and torch an empty Q first.
    if isinstance(tall, np.ndarray):
        return np.linalg.qr(tall, mode="r")
    return xp.linalg.qr(tall, mode="r")[1]


def unit_rows(xp: Any, x: Array) -> tuple[Array, Array]:
    """Rows at length 1 (zero rows stay zero) and the lengths (..., N), without overflow or underflow of squares."""
    top = peak(xp, x, axis=-1)
    scaled = x / top
    length = xp.sqrt(xp.sum(scaled * scaled, axis=-1, keepdims=True))
    unit = scaled / xp.where(length > 0, length, xp.ones_like(length))
    return unit, (top * length)[..., 0]


def ratio(xp: Any, over: Array, under: Array) -> Array:
    """``over / under``, NaN where ``under`` is zero."""
    safe = xp.where(under == 0, xp.ones_like(under), under)
    return xp.where(under == 0, xp.full_like(under, xp.nan), over / safe)


def masked_mean(xp: Any, values: Array, valid: Array) -> Array:
    """The mean of ``values`` over their last axis where ``valid``, NaN where none is."""
    counted = xp.where(valid, values, xp.zeros_like(values))
    return ratio(xp, xp.sum(counted, axis=-1), xp.sum(xp.astype(valid, xp.float64), axis=-1))
