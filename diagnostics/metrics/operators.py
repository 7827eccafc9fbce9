"""What kind of operator is a connection? Singular values and eigenvalues, norms without cancellation, normality."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.diagnostics.metrics.declaration import metric
from depthscope.diagnostics.metrics.mixing import GAIN, LARGEST_TOKEN, PER_PRODUCT, PER_TOKEN
from depthscope.diagnostics.quantities.mixing_matrices import Mixing, rescaled
from depthscope.diagnostics.quantities.registry import with_attrs

# In the order of the labels of the dim `norm`; the values are those of the kernel's `order`.
NORMS = {"infinity": math.inf, "one": 1, "two": 2}


@metric(
    symbol=r"\sigma_i(H)",
    dims="connection component reduction",
    cite="xie2025mhc",
    basis="stream",
    null=1.0,
    estimator=PER_TOKEN,
)
def mixing_singular_value(mixing: Mixing) -> xr.Variable:
    """Singular values of one connection, the largest first.

    The largest is the spectral norm: 1 for a doubly stochastic matrix, above it the connection expands.
    """
    return _by_component(mixing, mixing.each(kernel.singular_values))


@metric(
    symbol=r"\sigma_i(P)",
    dims="connection component reduction",
    scale="log",
    cite="xie2025mhc",
    basis="stream",
    null=1.0,
    estimator=PER_PRODUCT,
)
def composite_singular_value(mixing: Mixing) -> xr.Variable:
    """Singular values of the product of all connections from the embedding on, the largest first."""
    return _by_component(mixing, mixing.each_product(product_singular_values), depends_on="earlier")


@metric(
    symbol=r"|\lambda_i(H)|",
    dims="connection component reduction",
    cite="seneta2006nonnegative",
    basis="stream",
    null=1.0,
    estimator=PER_TOKEN,
)
def mixing_eigenvalue_modulus(mixing: Mixing) -> xr.Variable:
    """Magnitudes of the eigenvalues of one connection, the largest first.

    The second tells how fast repeated mixing makes the streams equal: to 1 % after ln 0.01 / ln|λ₂| layers.
    """
    return _by_component(mixing, mixing.each(lambda h: np.abs(kernel.eigenvalues(h))))


def product_singular_values(products: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
    """Singular values (..., n) of products (..., n, n), which have one log scale (...) each."""
    return rescaled(kernel.singular_values(products), log_scale[..., None])


def _by_component(mixing: Mixing, values: np.ndarray, *, depends_on: str = "itself") -> xr.Variable:
    return mixing.reduced(values, ("component",), depends_on=depends_on)


def _norms(matrices: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
    """Operator norms (..., 3) of matrices (..., n, n) times e^log_scale, in the order of `NORMS`."""
    # A norm is proportional to its matrix: the scale can be put back into it.
    return np.stack(
        [rescaled(kernel.operator_gain(matrices, order), log_scale) for order in NORMS.values()], axis=-1
    )


@metric(
    symbol=r"\|P\|_p",
    dims="norm connection reduction",
    scale="log",
    healthy=GAIN,
    cite="xie2025mhc",
    basis="stream",
    null=1.0,
    estimator=PER_PRODUCT,
    better="nearer 1",
)
def composite_operator_gain(mixing: Mixing) -> xr.Variable:
    r"""Operator norms of the product of all connections from the embedding on: what signed sums can hide by cancellation.

    .. math:: \|P\|_\infty = \max_i \textstyle\sum_j |P_{ij}|, \quad \|P\|_1 = \max_j \sum_i |P_{ij}|, \quad \|P\|_2 = \sigma_1

    of :math:`P = H_c \cdots H_2 H_1`.
    """
    gains = mixing.each_product(_norms)  # (C, N, 3)
    largest = [mixing.largest_tokens(gains[..., number]) for number in range(len(NORMS))]
    found = mixing.reduced(gains, ("norm",), depends_on="earlier").transpose("norm", ...)
    return with_attrs(found, {LARGEST_TOKEN: largest})
