"""What do wide random networks do, layer by layer? Mean-field maps of length and correlation, and their slopes.

All expectations are over Gaussians, by the midpoint rule: on the real line it converges exponentially for smooth
functions (Gauss-Hermite nodes would be too far from each other for slopes as narrow as 1/√q). Scalars in, floats out.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy.special import erf, expit, ndtr

from depthscope.diagnostics.errors import InputError

# Nodes reach to ±13, where the density e^(−z²/2) is 2e-37. Their distance is at most 0.1, and 0.25/√q for a variance q
# above 6: φ(√q z) changes over a range of z of about 1/√q. The tests compare with adaptive quadrature.
REACH, STEP, STEP_OF_SLOPE = 13.0, 0.1, 0.25
# The largest numbers of nodes on each side of zero, in one and in two dimensions: enough for variances up to about 1e6
# and 1500. Beyond, nodes stay that far from each other.
MAX_NODES, MAX_NODES_2D = 50_000, 2_000
# Entries of one block of a two-dimensional expectation: 8 MB, so that 4000 × 4000 nodes are never in memory.
BLOCK = 1_000_000

Activation = str | Callable[[np.ndarray], np.ndarray]
"""A name of `ACTIVATIONS` or a function of an array."""

ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "linear": (lambda h: h, np.ones_like),
    "relu": (lambda h: np.maximum(h, 0.0), lambda h: (h > 0).astype(float)),
    "tanh": (np.tanh, lambda h: 1.0 - np.tanh(h) ** 2),
    "erf": (erf, lambda h: 2.0 / np.sqrt(np.pi) * np.exp(-(h**2))),
    "gelu": (lambda h: h * ndtr(h), lambda h: ndtr(h) + h * np.exp(-(h**2) / 2.0) / np.sqrt(2.0 * np.pi)),
    "silu": (lambda h: h * expit(h), lambda h: expit(h) * (1.0 + h * expit(-h))),
}
"""Each with its derivative; GELU is the exact one, h Φ(h)."""


@lru_cache(maxsize=32)
def _rule(half: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the midpoint rule, ``half`` nodes on each side of zero.

    None at zero, where ReLU has its kink: each node then belongs to one of its two branches.
    """
    z = REACH / half * (np.arange(-half, half) + 0.5)
    weight = np.exp(-(z**2) / 2.0)
    return z, weight / weight.sum()  # E 1 = 1 to the last bit


def _nodes(q: float, most: int = MAX_NODES) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the standard normal law, dense enough for functions of √q z."""
    step = min(STEP, STEP_OF_SLOPE / np.sqrt(q)) if q > 0 else STEP
    return _rule(min(int(np.ceil(REACH / step)), most))


def _pair(phi: Activation) -> tuple[Callable, Callable]:
    """An activation and its derivative, by central differences for a function that is not in `ACTIVATIONS`."""
    if callable(phi):
        return phi, lambda h: (phi(h + 1e-5) - phi(h - 1e-5)) / 2e-5
    if not isinstance(phi, str) or phi not in ACTIVATIONS:
        raise InputError(f"phi is {phi!r}; expected one of {', '.join(ACTIVATIONS)} or a function")
    return ACTIVATIONS[phi]


def _is_number(value: float) -> bool:
    """Whether this is one real number, neither NaN nor infinite."""
    array = np.asarray(value)
    return array.ndim == 0 and array.dtype.kind in "iuf" and bool(np.isfinite(array))


def _require_length(q: float) -> None:
    """Refuse a squared length below zero or not finite."""
    if not (_is_number(q) and q >= 0):
        raise InputError(f"q is {q!r}; expected a squared length, one number, finite and not negative")


def _require_scales(sigma_w: float, sigma_b: float) -> None:
    """Refuse scales of weights and bias that are no numbers."""
    if not (_is_number(sigma_w) and _is_number(sigma_b)):
        raise InputError(
            f"sigma_w is {sigma_w!r} and sigma_b {sigma_b!r}; expected one finite number each: the scales of weights "
            "and bias"
        )


def q_map(q: float, sigma_w: float, sigma_b: float, phi: Activation) -> float:
    """Length map: q' = σ_w² E[φ(√q z)²] + σ_b², the variance of the next pre-activation.

    Parameters
    ----------
    q
        Variance of the pre-activation.
    sigma_w, sigma_b
        Weight scale (variance σ_w²/width) and bias scale.
    phi
        A name of `ACTIVATIONS` or a function.

    Returns
    -------
    float
        The next variance. Source: Poole et al. 1606.05340.

    Raises
    ------
    InputError
        If ``q`` is negative, a scale is not finite or ``phi`` unknown.

    Examples
    --------
    >>> round(q_map(2.0, 2.0**0.5, 0.0, "relu"), 9)
    2.0
    """
    _require_length(q)
    _require_scales(sigma_w, sigma_b)
    z, weight = _nodes(q)
    return float(sigma_w**2 * np.sum(weight * _pair(phi)[0](np.sqrt(q) * z) ** 2) + sigma_b**2)


def c_map(c: float, q: float, sigma_w: float, sigma_b: float, phi: Activation) -> float:
    """Correlation map of two inputs of equal length: c' = (σ_w² E[φ(u)φ(v)] + σ_b²) / q'.

    u and v are Gaussians of variance q and correlation c. A kink (ReLU) is integrated in closed form.

    Parameters
    ----------
    c
        Correlation, between −1 and 1.
    q
        Variance of both pre-activations.
    sigma_w, sigma_b
        Weight and bias scale.
    phi
        A name of `ACTIVATIONS` or a smooth function.

    Returns
    -------
    float
        The next correlation; NaN where the next length is zero. Source: Poole et al. 1606.05340.

    Raises
    ------
    InputError
        If ``c`` is not a correlation, ``q`` is negative, a scale is not finite or ``phi`` unknown.

    Examples
    --------
    >>> round(c_map(0.0, 1.0, 2.0**0.5, 0.0, "relu"), 9) == round(1 / 3.141592653589793, 9)
    True
    """
    if not (_is_number(c) and -1 <= c <= 1):
        raise InputError(f"c is {c!r}; expected a correlation, one number between -1 and 1")
    length = q_map(q, sigma_w, sigma_b, phi)
    if length == 0:
        return float("nan")
    # The kinks of φ(u)φ(v) are along lines that no grid follows: a rule on nodes converges slowly there.
    product = _relu_product(c, q) if phi == "relu" else _product(c, q, _pair(phi)[0])
    return float((sigma_w**2 * product + sigma_b**2) / length)


def _relu_product(c: float, q: float) -> float:
    """E[φ(u)φ(v)] for ReLU: the arc-cosine kernel of degree 1 (Cho & Saul 2009)."""
    angle = np.arccos(c)
    return q / (2 * np.pi) * (np.sin(angle) + (np.pi - angle) * c)


def _product(c: float, q: float, phi: Callable) -> float:
    """E[φ(u)φ(v)] on a grid of nodes, a block of its rows at a time."""
    # u = √q z₁ and v = √q (c z₁ + √(1 − c²) z₂) have correlation c for independent z₁, z₂.
    z, weight = _nodes(q, MAX_NODES_2D)
    total, rows = 0.0, max(1, BLOCK // len(z))
    for start in range(0, len(z), rows):
        part = slice(start, start + rows)
        v = np.sqrt(q) * (c * z[part, None] + np.sqrt(1 - c * c) * z[None, :])
        total += float((weight[part] * phi(np.sqrt(q) * z[part])) @ (phi(v) @ weight))
    return total


def chi_1(sigma_w: float, sigma_b: float, phi: Activation, q: float) -> float:
    """Gradient multiplier χ₁ = σ_w² E[φ′(√q z)²]: above 1 gradients explode, below 1 they vanish.

    Parameters
    ----------
    sigma_w, sigma_b
        Weight and bias scale; the bias enters through ``q`` alone.
    phi
        A name of `ACTIVATIONS` or a smooth function.
    q
        Variance of the pre-activation, usually the fixed point of `q_map`.

    Returns
    -------
    float
        The slope of the correlation map at c = 1. Source: Schoenholz et al. 1611.01232.

    Raises
    ------
    InputError
        If ``q`` is negative, a scale is not finite or ``phi`` unknown.

    Examples
    --------
    >>> round(chi_1(2.0**0.5, 0.0, "relu", 1.0), 9)
    1.0
    """
    _require_length(q)
    _require_scales(sigma_w, sigma_b)
    z, weight = _nodes(q)
    return float(sigma_w**2 * np.sum(weight * _pair(phi)[1](np.sqrt(q) * z) ** 2))
