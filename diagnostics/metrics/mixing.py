"""How much do the connections amplify, fade or mix the streams? Gains of H_res and its products, sums, entropy."""

from __future__ import annotations

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.diagnostics.metrics.declaration import OURS, Range, metric
from depthscope.diagnostics.quantities.mixing_matrices import Mixing, rescaled
from depthscope.diagnostics.quantities.registry import quantity, with_attrs
from depthscope.diagnostics.schema import NOT_FINITE

# Reduced over tokens last, in each of these metrics: the product of means is not the mean of products.
PER_TOKEN = "per token in float64, then reduced over tokens"
PER_PRODUCT = "product per token in float64, then reduced over tokens"
LARGEST_TOKEN = "largest_token"
"""Attribute of a gain: sequence and position of the token with the largest value, by its first dim and connection."""

# Nulls here and in `operators` and `contraction` are the values of the identity, the H_res of a plain residual network; only
# the entropy is compared with uniform mixing.

ROUNDING = 1e-12  # a trace that is smaller relative to its matrix is the rounding of 0

# As in the verdicts on gains: the mHC paper reports about 1.6 for mHC and 3000 for an unstable HC.
GAIN = Range(high=10.0, source=OURS)


def _by_direction(parts: list[xr.Variable]) -> xr.Variable:
    """Forward and backward values as one array."""
    return xr.Variable.concat(parts, "direction")


@quantity
def connection_gains(mixing: Mixing) -> xr.Variable:
    """Amax gains of every connection, reduced over tokens: (direction, connection, reduction)."""
    gains = [mixing.each(gain) for gain in (kernel.forward_gain, kernel.backward_gain)]
    found = _by_direction([mixing.reduced(gain) for gain in gains])
    facts = {NOT_FINITE: mixing.not_finite} if mixing.not_finite else {}
    return with_attrs(found, {**facts, LARGEST_TOKEN: [mixing.largest_tokens(gain) for gain in gains]})


@quantity
def product_gains(mixing: Mixing) -> xr.Variable:
    """The same of the products of all connections from the embedding on."""
    logarithms = [
        mixing.each_product(log_gain) for log_gain in (kernel.log_forward_gain, kernel.log_backward_gain)
    ]
    # A gain beyond float64, of hundreds of layers, is infinite rather than an error.
    with np.errstate(over="ignore"):
        gains = [np.exp(logarithm) for logarithm in logarithms]
    found = _by_direction([mixing.reduced(gain, depends_on="earlier") for gain in gains])
    return with_attrs(found, {LARGEST_TOKEN: [mixing.largest_tokens(gain) for gain in gains]})


@metric(
    symbol=r"\max_i |\sum_j H_{ij}|",
    dims="direction connection reduction",
    scale="log",
    healthy=GAIN,
    cite="xie2025mhc",
    basis="stream",
    null=1.0,
    estimator=PER_TOKEN,
    headline=True,
    better="nearer 1",
)
def mixing_gain(connection_gains: xr.Variable) -> xr.Variable:
    r"""Amax gain of one connection: the largest signed row sum forward, column sum backward.

    .. math:: \max_i |\textstyle\sum_j H_{ij}| \quad\text{and}\quad \max_j |\sum_i H_{ij}|

    1 for a doubly stochastic matrix. Signed sums hide cancellation: read the singular values too.
    """
    return connection_gains


@metric(
    symbol=r"\max_i |\sum_j P_{ij}|",
    dims="direction connection reduction",
    scale="log",
    healthy=GAIN,
    cite="xie2025mhc",
    basis="stream",
    null=1.0,
    estimator=PER_PRODUCT,
    headline=True,
    better="nearer 1",
)
def composite_gain(product_gains: xr.Variable) -> xr.Variable:
    r"""Amax gain of the product of all connections from the embedding on.

    .. math:: P = H_c \cdots H_2 H_1

    The mHC paper reports about 3000 for a 27B HC and 1.6 for mHC.
    """
    return product_gains


@metric(
    symbol=r"\|\Sigma_j H_{ij} - 1\|_\infty",
    dims="kind connection reduction",
    scale="log",
    # An error of 0.01 in every sum is a gain of 1.8 over 60 connections.
    healthy=Range(high=1e-2, source=OURS),
    cite="sinkhorn1967concerning",
    basis="stream",
    null=0.0,
    estimator=PER_TOKEN,
    headline=True,
    better="lower",
)
def doubly_stochastic_violation(mixing: Mixing) -> xr.Variable:
    """Distance from doubly stochastic: worst row sum, worst column sum, most negative entry.

    Sinkhorn ends on one side, whose sums are exact; all error of stopping early sits in the other.
    """
    return mixing.reduced(mixing.each(_violations), ("kind",)).transpose("kind", ...)


def _violations(matrices: np.ndarray) -> np.ndarray:
    """Distances of matrices (..., n, n) from doubly stochastic, (..., 3): the kinds of `kernel.Violation`."""
    return np.stack(kernel.doubly_stochastic_violation(matrices), axis=-1)


def _weakest_sums(matrices: np.ndarray) -> np.ndarray:
    """Weakest row sum and weakest column sum, (..., 2)."""
    found = kernel.attenuation(matrices)
    return np.stack([found.row, found.column], axis=-1)


def weakest_product_sums(products: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
    """Weakest row sum and weakest column sum (..., 2) of products (..., n, n) with log scales (...)."""
    return rescaled(_weakest_sums(products), log_scale[..., None])


@metric(
    symbol=r"\min_i |\sum_j P_{ij}|",
    dims="direction connection reduction",
    scale="log",
    # As in the verdict `attenuation`: less than half is left.
    healthy=Range(low=0.5, source=OURS),
    cite="xie2025mhc",
    basis="stream",
    null=1.0,
    estimator=PER_PRODUCT,
    better="nearer 1",
)
def composite_attenuation(mixing: Mixing) -> xr.Variable:
    r"""Weakest sum of the product of all connections: what the largest one hides.

    .. math:: \min_i |\textstyle\sum_j P_{ij}| \quad\text{and backward}\quad \min_j |\sum_i P_{ij}|
    """
    weakest = mixing.each_product(weakest_product_sums)
    return _by_direction([mixing.reduced(weakest[..., side], depends_on="earlier") for side in (0, 1)])


@metric(
    symbol=r"\|H - I\|_F / \sqrt{n}",
    dims="connection reduction",
    # Of four streams, each gives 1.4 % of itself to every other.
    healthy=Range(low=0.05, source=OURS),
    cite=OURS,
    basis="stream",
    null=0.0,
    estimator=PER_TOKEN,
    headline=True,
)
def identity_distance(mixing: Mixing) -> xr.Variable:
    """Distance of a connection from the identity: 0 where the streams do not mix."""
    return mixing.reduced(mixing.each(kernel.identity_distance))
