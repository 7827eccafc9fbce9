"""What every kernel of mixing matrices starts from: square matrices in float64, batch last, and logarithms of sizes."""

from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj

from depthscope.diagnostics.kernels._arrays import Array, as_float64, checked

# A running product is rescaled when its size leaves this range; inside, it is the plain product.
SMALL, LARGE = 1e-100, 1e100
LOG_MAX = 709.78


def square(p: Array, *, name: str = "p", ndim: int = 2) -> tuple[Any, Array]:
    """The namespace and the float64 value of square matrices (..., n, n)."""
    xp, p = as_float64(p, name=name, ndim=ndim)
    if p.shape[-1] != p.shape[-2]:
        raise ValueError(f"{name} has shape {tuple(p.shape)}; expected square mixing matrices (..., n, n)")
    return xp, p


def square_in_memory(p: Array, *, name: str = "p", ndim: int = 2) -> tuple[Any, Array]:
    """The same, as numpy's wherever the processor reaches the numbers: its small operations cost least."""
    xp, p = checked(p, name=name, ndim=ndim)
    return square(in_memory(xp.astype(p, xp.float64, copy=False)), name=name, ndim=ndim)


def identity(xp: Any, p: Array) -> Array:
    """The identity (n, n) beside ``p``."""
    return xp.eye(p.shape[-1], dtype=xp.float64, device=device(p))


def log(xp: Any, x: Array) -> Array:
    """Ln x of values ≥ 0, −inf at zero without a warning."""
    return xp.where(x > 0, xp.log(xp.where(x > 0, x, xp.ones_like(x))), xp.full_like(x, -xp.inf))


def in_memory(x: Array) -> Array:
    """The same numbers as a numpy array where the processor reaches them."""
    return np.asarray(x) if str(device(x)) == "cpu" else x


def as_given(given: Array, found: Array) -> Array:
    """A result as a tensor where a tensor was given and the work was numpy's."""
    if isinstance(given, np.ndarray) or not (isinstance(found, np.ndarray) and is_array_api_obj(given)):
        return found
    return array_namespace(given).asarray(found)


def rescaled(xp: Any, values: Array, log_scale: Array, *, dims: int) -> tuple[Array, Array]:
    """Values (dims of one thing first, batch last) brought back to size 1 where they leave the range."""
    letters = "ijkl"[:dims]
    with np.errstate(over="ignore", under="ignore"):
        size = xp.einsum(f"{letters}...,{letters}...->...", values, values)
    if bool(xp.min(size) > SMALL**2) and bool(xp.max(size) < LARGE**2):
        return values, log_scale
    top = xp.max(xp.abs(values), axis=tuple(range(dims)))
    out = ((top > LARGE) | (top < SMALL)) & (top > 0)
    top = xp.where(out, top, xp.ones_like(top))
    return values / top, log_scale + xp.log(top)


def unscaled(xp: Any, values: Array, log_scale: Array) -> Array:
    """Values · e^log_scale; what is zero stays zero where the scale overflows."""
    if not bool(xp.any(log_scale != 0)):
        return values
    beyond = log(xp, xp.abs(values)) + log_scale > LOG_MAX
    half = xp.exp(xp.clip(log_scale / 2.0, max=400.0))
    within = xp.where(beyond, xp.zeros_like(values), values) * half * half  # in halves: e^scale may overflow
    return xp.where(beyond, xp.copysign(xp.full_like(values, xp.inf), values), within)
