"""What do all kernels of mixing matrices need? Square matrices in float64, logarithms, products without overflow."""

from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels._arrays import Array, as_float64, checked

# A running product is rescaled where its size leaves this range: one more matrix, of size up to 1e100 as well, cannot
# then overflow (1e308). Inside the range it is the plain product, to the last bit.
SMALL, LARGE = 1e-100, 1e100
LOG_MAX = 709.78  # the logarithm of the largest float64


def square(p: Array, *, name: str = "p", ndim: int = 2) -> tuple[Any, Array]:
    """The namespace and the float64 value of square matrices (..., n, n)."""
    xp, p = as_float64(p, name=name, ndim=ndim)
    if p.shape[-1] != p.shape[-2]:
        raise InputError(f"{name} has shape {tuple(p.shape)}; expected square mixing matrices (..., n, n)")
    return xp, p


def square_in_memory(p: Array, *, name: str = "p", ndim: int = 2) -> tuple[Any, Array]:
    """The same as numpy arrays for tensors on the CPU: numpy's overhead for small operations is several times smaller."""
    xp, p = checked(p, name=name, ndim=ndim)
    return square(in_memory(xp.astype(p, xp.float64, copy=False)), name=name, ndim=ndim)


def identity(xp: Any, p: Array) -> Array:
    """The identity (n, n) on the device of ``p``."""
    return xp.eye(p.shape[-1], dtype=xp.float64, device=device(p))


def log(xp: Any, x: Array) -> Array:
    """Ln x of values ≥ 0, −inf at zero without a warning."""
    return xp.where(x > 0, xp.log(xp.where(x > 0, x, xp.ones_like(x))), xp.full_like(x, -xp.inf))


def in_memory(x: Array) -> Array:
    """A tensor on the CPU as a numpy array over the same memory; others as they are."""
    return np.asarray(x) if str(device(x)) == "cpu" else x


def as_given(given: Array, found: Array) -> Array:
    """The result ``found`` as a tensor where the input ``given`` was one and numpy computed it."""
    if isinstance(given, np.ndarray) or not (isinstance(found, np.ndarray) and is_array_api_obj(given)):
        return found
    return array_namespace(given).asarray(found)


def rescaled(xp: Any, values: Array, log_scale: Array, *, dims: int) -> tuple[Array, Array]:
    """Values divided by their largest entry where they leave the range, and their log scale with its logarithm added.

    The first ``dims`` dims are those of a matrix or vector, the others are batch.
    """
    letters = "ijkl"[:dims]
    # Squared Frobenius norms in one pass tell that nothing is to be done, nearly always; they may overflow.
    with np.errstate(over="ignore", under="ignore"):
        size = xp.einsum(f"{letters}...,{letters}...->...", values, values)
    if bool(xp.min(size) > SMALL**2) and bool(xp.max(size) < LARGE**2):
        return values, log_scale
    top = xp.max(xp.abs(values), axis=tuple(range(dims)))
    out = ((top > LARGE) | (top < SMALL)) & (top > 0)
    top = xp.where(out, top, xp.ones_like(top))
    return values / top, log_scale + xp.log(top)


def unscaled(xp: Any, values: Array, log_scale: Array) -> Array:
    """Values · e^log_scale, infinite where that exceeds float64; zeros stay zero (0 · ∞ would be NaN)."""
    if not bool(xp.any(log_scale != 0)):
        return values
    beyond = log(xp, xp.abs(values)) + log_scale > LOG_MAX
    half = xp.exp(xp.clip(log_scale / 2.0, max=400.0))
    # In two halves: a small value times e^scale may be a float64 where e^scale is not.
    within = xp.where(beyond, xp.zeros_like(values), values) * half * half
    return xp.where(beyond, xp.copysign(xp.full_like(values, xp.inf), values), within)
