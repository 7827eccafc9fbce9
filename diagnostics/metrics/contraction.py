"""Do the connections make the streams equal? What products leave of their differences, contraction, Lyapunov exponents."""

from __future__ import annotations

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.diagnostics.metrics.declaration import OURS, Range, metric
from depthscope.diagnostics.metrics.mixing import PER_PRODUCT, PER_TOKEN
from depthscope.diagnostics.quantities.mixing_matrices import Mixing, over_tokens, rescaled
from depthscope.diagnostics.quantities.registry import quantity


@quantity
def left_of_differences(mixing: Mixing) -> np.ndarray:
    """Logarithm of what every product from the embedding on leaves of the differences between streams, (C, N)."""
    return _left_of_differences(mixing)


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


@metric(
    symbol=r"\sigma_1(S|_{1^\perp})",
    dims="connection reduction",
    scale="log",
    cite="seneta2006nonnegative",
    basis="stream",
    null=1.0,
    estimator=PER_PRODUCT,
    better="higher",
)
def suffix_deflated_gain(mixing: Mixing) -> xr.Variable:
    r"""What is left of a difference between streams on its way to the head: the product from a connection on.

    .. math:: S = H_C \cdots H_{c+1} H_c, \quad \sigma_1\big(U^\top S\, U\big) \text{ by products of } U^\top H U

    Below 0.01 what a connection writes to one stream reaches the head as if written to all.
    """
    return mixing.reduced(gain_of(_left_of_differences(mixing, reverse=True)), depends_on="later")


def _left_of_differences(mixing: Mixing, *, reverse: bool = False) -> np.ndarray:
    """Logarithm of the deflated gain (C, N), a block of tokens at a time."""
    parts = [kernel.deflated_gain(h, reverse=reverse) for h in mixing.token_blocks()]
    return np.concatenate(parts, axis=1)


@metric(
    symbol=r"1 - |\lambda_2|",
    dims="connection reduction",
    cite="seneta2006nonnegative",
    basis="stream",
    null=0.0,
    estimator=PER_TOKEN,
    separable=True,
)
def spectral_gap(mixing: Mixing, eigenvalue_moduli: np.ndarray) -> xr.Variable:
    r"""Spectral gap of one connection: how fast repeated mixing makes the streams equal.

    .. math:: 1 - |\lambda_2|

    0 for the identity, 1 where one connection already makes all streams the same.
    """
    # In descending order: the first one is that of the mean over streams, 1 where all sums of H are.
    return mixing.reduced(1.0 - eigenvalue_moduli[..., 1])


@metric(
    symbol=r"\tau(H)",
    dims="connection reduction",
    label="Dobrushin",
    cite="seneta2006nonnegative",
    basis="stream",
    null=1.0,
    estimator=PER_TOKEN,
    separable=True,
)
def dobrushin(mixing: Mixing) -> xr.Variable:
    r"""Dobrushin coefficient of one connection: the share of differences between streams that may survive.

    .. math:: \tau = \tfrac{1}{2} \max_{i,k} \textstyle\sum_j |H_{ij} - H_{kj}|

    1 for the identity, 0 for uniform mixing; that of a product is at most the product of those of its parts.
    """
    return mixing.reduced(mixing.each(kernel.dobrushin))


@metric(
    symbol=r"\tau(P)",
    dims="connection reduction",
    label="composite Dobrushin",
    scale="log",
    cite="seneta2006nonnegative",
    basis="stream",
    null=1.0,
    estimator=PER_PRODUCT,
)
def composite_dobrushin(mixing: Mixing) -> xr.Variable:
    r"""Dobrushin coefficient of the product of all connections: the share of differences that may survive.

    .. math:: \tau(P) = \tfrac{1}{2} \max_{i,k} \textstyle\sum_j |P_{ij} - P_{kj}|

    It stops at rounding, near 1e-16; the deflated gain goes on below.
    """
    # τ is proportional to P, so that the scale that was taken out of P can be put back into τ.
    share = mixing.each_product(lambda product, log_scale: rescaled(kernel.dobrushin(product), log_scale))
    return mixing.reduced(share, depends_on="earlier")


@metric(
    symbol=r"\lambda^{\mathrm{Lyap}}_i",
    dims="component reduction",
    label="Lyapunov spectrum",
    units="nat per connection",
    cite="benettin1980lyapunov",
    basis="stream",
    null=0.0,
    estimator="QR along the depth per token in float64, then reduced over tokens",
    infinite=True,
)
def lyapunov_spectrum(mixing: Mixing) -> xr.Variable:
    r"""Lyapunov exponents of the product of all connections: growth of each direction per connection, the largest first.

    .. math:: \tfrac{1}{C} \textstyle\sum_c \ln |R_{c,ii}|, \quad H_c Q_{c-1} = Q_c R_c

    The first is 0 for stochastic matrices; the others tell how fast the streams become equal.
    """
    # `over_tokens` reduces values of connections: this is one value for all of them.
    of_tokens = np.concatenate([kernel.lyapunov_spectrum(h) for h in mixing.token_blocks()])
    exponents = over_tokens(of_tokens[None])[0]
    # They are of the product of all connections: one connection that is not finite leaves none.
    if not mixing.finite.all():
        exponents = np.full_like(exponents, np.nan)
    return xr.Variable(("component", "reduction"), exponents)
