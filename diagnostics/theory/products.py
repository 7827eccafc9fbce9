"""What do random connections do? Spectra of one, and of the product from the embedding on, by Monte Carlo."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp, ndtri

from depthscope.diagnostics.quantities.registry import Unavailable
from depthscope.diagnostics.theory.laws import Measured, law

STOCHASTIC = 0.05
"""Mean violation up to which connections count as doubly stochastic. Heuristic."""
DRAWS = 200
"""Random products of which the law is the mean or median: its error is then 1/14 of their spread. Heuristic."""


@law(
    label="Gaussian product",
    equation=r"P_c = \prod_{k \le c} (a_k I + s_k G_k), \quad a = \mathrm{tr}\,H / n, \; "
    r"n^2 s^2 = \|H\|_F^2 - n a^2; \quad a = 0: \; \tfrac{1}{c} \ln \sigma_i \to "
    r"\tfrac{1}{2}\big(\ln 2 s^2 + \psi\big(\tfrac{n - i + 1}{2}\big)\big)",
    cite="newman1986distribution",
    assumption="connections that are independent and random but for their measured trace and norm",
    metrics=("composite_singular_value",),
)
def random_product(measured: Measured) -> np.ndarray:
    """Singular values of a product of random connections with the trace and the norm of the measured ones.

    G has independent standard normal entries. Where the connections are doubly stochastic the law is that on
    the differences between streams, and the first value is 1. Values are the mean or the median of 200 products
    with a fixed seed, as the curve is over tokens; NaN below 1e-12 of the first value, where float64 has no digits left.
    """
    reduction = _reduction(measured)
    values = _reduced_products(_moments(measured), reduction)
    return values[:, int(measured.label("component"))]


@law(
    label="random connection",
    equation=r"H = a I + s G, \quad a = \mathrm{tr}\,H / n, \; n^2 s^2 = \|H\|_F^2 - n a^2; \quad "
    r"a = 0: \; |\lambda| \text{ fills the disc of radius } s\sqrt{n}",
    cite="ginibre1965statistical",
    assumption="a connection that is random but for its measured trace and norm",
    metrics=("mixing_singular_value", "mixing_eigenvalue_modulus"),
)
def random_connection(measured: Measured) -> np.ndarray:
    """Singular values and eigenvalue moduli of a random connection with the trace and the norm of the measured one.

    G has independent standard normal entries (Ginibre's ensemble). Where the connections are doubly stochastic the
    law is that on the differences between streams, and the first value is 1. Mean or median of 200 draws with a
    fixed seed.
    """
    reduction = _reduction(measured)
    values = _reduced_connections(_moments(measured), str(measured.curve.name), reduction)
    return values[:, int(measured.label("component"))]


def _reduction(measured: Measured) -> str:
    """The reduction of the curve over tokens, refused unless the draws can be reduced in the same way."""
    reduction = measured.label("reduction")
    if reduction not in ("mean", "median"):
        raise Unavailable(f"the law is of the mean or the median over tokens, not of their {reduction}")
    return reduction


class _Moments(NamedTuple):
    """What the random connections have in common with the measured ones; hashable, as a key of the caches below."""

    traces: tuple[float, ...]
    energies: tuple[float, ...]  # ‖H‖_F²
    num_streams: int
    stochastic: bool  # doubly: the sum over streams is preserved


def _moments(measured: Measured) -> _Moments:
    """The moments of the measured connections, as means over tokens."""
    energies = _second_moment(measured, "mixing_singular_value", over="component")
    num_streams = energies.shape[1]
    energy = energies.sum(axis=1)
    distance = _second_moment(measured, "identity_distance")
    trace = 0.5 * (energy + num_streams * (1.0 - distance))  # ‖H − I‖² = ‖H‖² − 2 tr H + n
    violation = measured.other("doubly_stochastic_violation", over="kind", reduction="mean")
    return _Moments(tuple(trace), tuple(energy), num_streams, bool(violation.max() < STOCHASTIC))


def _second_moment(measured: Measured, name: str, over: str = "") -> np.ndarray:
    """Mean square over tokens, from the mean and from the 1st and 99th percentile as those of a normal law.

    An analysis contains no standard deviation over tokens: 2 · 2.326 of them are between these percentiles.
    """
    mean, low, high = (measured.other(name, over=over, reduction=label) for label in ("mean", "p1", "p99"))
    return mean**2 + ((high - low) / (2.0 * ndtri(0.99))) ** 2


def _random_parts(moments: _Moments) -> tuple[np.ndarray, np.ndarray, int, int]:
    """A and s of each connection H = a I + s G, the size of G, and the number of values that are 1 (0 or 1)."""
    # A doubly stochastic matrix maps the mean over streams to itself: one singular value is 1, and what is random are
    # the n − 1 others.
    common = int(moments.stochastic)
    trace, energy = np.array(moments.traces) - common, np.array(moments.energies) - common
    size = moments.num_streams - common
    if not (np.isfinite(trace).all() and np.isfinite(energy).all()):
        raise Unavailable("a connection is not defined")
    middle = trace / size
    spread = np.sqrt(np.maximum(energy - size * middle**2, 0.0)) / size
    if spread.max() < 1e-6:  # float32 rounding of an identity
        raise Unavailable("every connection is a multiple of the identity: nothing random in them")
    return middle, spread, size, common


@lru_cache(maxsize=64)
def _reduced_products(moments: _Moments, reduction: str) -> np.ndarray:
    """Singular values (connections, streams) over products of random matrices, the largest first."""
    middle, spread, size, common = _random_parts(moments)
    logarithms = _log_products(middle, spread, size)
    if reduction == "median":
        reduced = np.median(logarithms, axis=1)
    else:  # the mean of values, in logarithms, which cannot overflow
        reduced = logsumexp(logarithms, axis=1) - np.log(logarithms.shape[1])
    values = np.concatenate([np.ones((len(middle), common)), np.exp(reduced)], axis=1)
    return np.where(values > 1e-12 * values[:, :1], values, np.nan)


@lru_cache(maxsize=64)
def _reduced_connections(moments: _Moments, name: str, reduction: str) -> np.ndarray:
    """Singular values or eigenvalue moduli (connections, streams) of random matrices, the largest first."""
    middle, spread, size, common = _random_parts(moments)
    # The same draws for every connection: their curve shows the connections, not the chance of each draw.
    draws = np.random.default_rng(0).standard_normal((DRAWS, size, size))
    reduce = np.median if reduction == "median" else np.mean
    values = np.ones((len(middle), common + size))
    for row, a, s in zip(values, middle, spread, strict=True):
        matrices = a * np.eye(size) + s * draws
        found = (
            np.linalg.svd(matrices, compute_uv=False)
            if name == "mixing_singular_value"
            else np.abs(np.linalg.eigvals(matrices))
        )
        row[common:] = reduce(np.sort(found, axis=1)[:, ::-1], axis=0)
    return values


def _log_products(middle: np.ndarray, spread: np.ndarray, size: int) -> np.ndarray:
    """Log singular values (connections, draws, size) of the products from the first connection on."""
    rng = np.random.default_rng(0)
    product, scale = np.broadcast_to(np.eye(size), (DRAWS, size, size)), np.zeros((DRAWS, 1))
    found = []
    for a, s in zip(middle, spread, strict=True):
        product = (a * np.eye(size) + s * rng.standard_normal((DRAWS, size, size))) @ product
        # Divided by the largest entry at each connection: a product of hundreds would overflow.
        largest = np.abs(product).max(axis=(1, 2), keepdims=True)
        product, scale = product / largest, scale + np.log(largest[:, 0])
        singular = np.linalg.svd(product, compute_uv=False)
        found.append(np.log(np.maximum(singular, np.finfo(float).tiny)) + scale)
    return np.stack(found)
