"""Do the connections make the streams equal? What products leave of their differences."""

from __future__ import annotations

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.diagnostics.metrics.declaration import OURS, Range, metric
from depthscope.diagnostics.metrics.mixing import PER_PRODUCT
from depthscope.diagnostics.quantities.mixing_matrices import Mixing
from depthscope.diagnostics.quantities.registry import quantity


@quantity
def left_of_differences(mixing: Mixing) -> np.ndarray:
    """Logarithm of what every product from the embedding on leaves of the differences between streams, (C, N)."""
    parts = [kernel.deflated_gain(h) for h in mixing.token_blocks()]  # a block of tokens at a time
    return np.concatenate(parts, axis=1)


@metric(
    symbol=r"\sigma_1(P|_{1^\perp})",
    dims="connection reduction",
    scale="log",
    cite="seneta2006nonnegative",
    basis="stream",
    null=1.0,
    estimator=PER_PRODUCT,
    headline=True,
    better="higher",
)
def deflated_gain(mixing: Mixing, left_of_differences: np.ndarray) -> xr.Variable:
    r"""What is left of the differences between streams: the product's norm off the mean.

    .. math:: \sigma_1\Big(\prod_l U^\top H_l U\Big), \quad U \text{ a basis of } 1^\perp

    0 for exactly nothing, and below 1e-308. Where sums are 1, below 0.01 all streams carry the same part of the embedding;
    else compare with the gain of what they have in common: `relative_deflated_gain`.
    """
    return mixing.reduced(gain_of(left_of_differences), depends_on="earlier")


@metric(
    symbol=r"\sigma_1(P|_{1^\perp}) / \bar{p}",
    dims="connection reduction",
    scale="log",
    healthy=Range(low=0.01, source=OURS),
    cite=OURS,
    basis="stream",
    null=1.0,
    estimator=PER_PRODUCT,
    infinite=True,
    better="higher",
)
def relative_deflated_gain(mixing: Mixing, left_of_differences: np.ndarray) -> xr.Variable:
    r"""What is left of the differences between streams, relative to what is left of a signal that they share.

    .. math:: \sigma_1\Big(\prod_l U^\top H_l U\Big) / \bar{p}, \quad \bar{p} = |1^\top P\, 1| / n

    The deflated gain over the gain of a signal that all streams share: the same number where sums are 1. Connections that
    fade or amplify everything equally leave it at 1; +inf where the common part cancels to nothing.
    """
    return mixing.reduced(left_beside_common(mixing, left_of_differences), depends_on="earlier")


def left_beside_common(mixing: Mixing, left_of_differences: np.ndarray) -> np.ndarray:
    """What is left of differences over what is left of a signal that all streams share, (C, N)."""
    # −∞ less −∞: both are nothing, and their ratio is not known.
    with np.errstate(invalid="ignore"):
        return gain_of(left_of_differences - mixing.each_product(_common_gain))


def gain_of(logarithm: np.ndarray) -> np.ndarray:
    """The gain of a natural logarithm: 0 of −∞ and below 1e-308, infinite beyond float64."""
    with np.errstate(over="ignore"):
        return np.exp(logarithm)


def _common_gain(products: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
    sums = np.abs(products.sum(axis=(-2, -1))) / products.shape[-1]
    # A sum of exactly zero is −∞, as the logarithm of nothing.
    with np.errstate(divide="ignore"):
        return np.log(sums) + log_scale
