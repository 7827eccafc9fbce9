"""What kind of operator is a connection? Norms without cancellation, contraction, departure from normality."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.diagnostics.kernels import rank
from depthscope.diagnostics.metrics.declaration import Range, metric
from depthscope.diagnostics.metrics.mixing import GAIN, PER_PRODUCT, PER_TOKEN
from depthscope.diagnostics.quantities.mixing_matrices import REDUCTIONS, Mixing, over_tokens, plain

NORMS = {"infinity": math.inf, "one": 1, "two": 2}


def _norms(mixing: Mixing, matrices: np.ndarray, scale: np.ndarray, *, composed: bool) -> xr.DataArray:
    """Operator norms of matrices (C, N, n, n), by name of the norm."""
    found = [
        mixing.reduced(plain(kernel.operator_gain(matrices, order), scale), composed=composed)
        for order in NORMS.values()
    ]
    return xr.concat(found, xr.Variable("norm", list(NORMS)))


@metric(
    symbol=r"\|H\|_p",
    dims="norm connection reduction",
    scale="log",
    healthy=GAIN,
    cite="xie2025mhc",
    basis="stream",
    null=1.0,
    estimator=PER_TOKEN,
)
def operator_gain(mixing: Mixing) -> xr.DataArray:
    r"""Operator norms of one connection: what signed sums can hide by cancellation.

    .. math:: \|H\|_\infty = \max_i \textstyle\sum_j |H_{ij}|, \quad \|H\|_1 = \max_j \sum_i |H_{ij}|, \quad \|H\|_2 = \sigma_1
    """
    return _norms(mixing, mixing.matrices, np.zeros(()), composed=False)


@metric(
    symbol=r"\|P\|_p",
    dims="norm connection reduction",
    scale="log",
    healthy=GAIN,
    cite="xie2025mhc",
    basis="stream",
    null=1.0,
    estimator=PER_PRODUCT,
)
def composite_operator_gain(mixing: Mixing) -> xr.DataArray:
    r"""Operator norms of the product of all connections from the embedding on.

    .. math:: P = H_c \cdots H_2 H_1
    """
    product, scale = mixing.prefix
    return _norms(mixing, product, scale, composed=True)


@metric(
    symbol=r"1 - |\lambda_2|",
    dims="connection reduction",
    cite="seneta2006nonnegative",
    basis="stream",
    null=0.0,
    estimator=PER_TOKEN,
)
def spectral_gap(mixing: Mixing, eigenvalue_moduli: np.ndarray) -> xr.DataArray:
    r"""Spectral gap of one connection: how fast repeated mixing makes the streams equal.

    .. math:: 1 - |\lambda_2|

    0 for the identity, 1 where one connection already makes all streams the same.
    """
    return mixing.reduced(1.0 - eigenvalue_moduli[..., 1])


@metric(
    symbol=r"\kappa(H)",
    dims="connection reduction",
    scale="log",
    healthy=Range(high=1e3, source="heuristic"),
    cite="golub2013matrix",
    basis="stream",
    null=1.0,
    estimator=PER_TOKEN,
    infinite=True,
)
def condition_number(mixing: Mixing, connection_spectrum: np.ndarray) -> xr.DataArray:
    r"""Condition number of one connection: infinite where it loses a combination of streams.

    .. math:: \sigma_1 / \sigma_n
    """
    return mixing.reduced(rank.condition_of(connection_spectrum))


@metric(
    symbol=r"\sqrt{\|H\|_F^2 - \textstyle\sum|\lambda|^2}",
    dims="connection reduction",
    label="Henrici",
    cite="henrici1962bounds",
    basis="stream",
    null=0.0,
    estimator=PER_TOKEN,
)
def henrici(mixing: Mixing) -> xr.DataArray:
    r"""Departure from normality of one connection: how far its powers can outgrow its eigenvalues.

    .. math:: \sqrt{\|H\|_F^2 - \textstyle\sum_i |\lambda_i|^2}
    """
    return mixing.reduced(mixing.each(kernel.henrici))


@metric(
    symbol=r"r(H)",
    dims="connection reduction",
    healthy=Range(high=1.05, source="heuristic"),
    cite="horn1991topics",
    basis="stream",
    null=1.0,
    estimator=PER_TOKEN,
    default=False,
)
def numerical_radius(mixing: Mixing) -> xr.DataArray:
    r"""Numerical radius of one connection: the most that a step can amplify before its powers settle.

    .. math:: \max_\theta \lambda_{\max}\big(\mathrm{Re}\, e^{i\theta} H\big), \quad \|H\|_2 / 2 \le r \le \|H\|_2
    """
    return mixing.reduced(kernel.numerical_radius(mixing.matrices))


@metric(
    symbol=r"\tau(H)",
    dims="connection reduction",
    label="Dobrushin",
    cite="seneta2006nonnegative",
    basis="stream",
    null=1.0,
    estimator=PER_TOKEN,
)
def dobrushin(mixing: Mixing) -> xr.DataArray:
    r"""Dobrushin coefficient of one connection: the share of differences between streams that may survive.

    .. math:: \tau = \tfrac{1}{2} \max_{i,k} \textstyle\sum_j |H_{ij} - H_{kj}|

    1 for the identity, 0 for uniform mixing; that of a product is at most the product of those of its parts.
    """
    return mixing.reduced(mixing.each(kernel.dobrushin))


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
def lyapunov_spectrum(mixing: Mixing) -> xr.DataArray:
    r"""Lyapunov exponents of the whole product: growth of each direction per connection, the largest first.

    .. math:: \tfrac{1}{C} \textstyle\sum_c \ln |R_{c,ii}|, \quad H_c Q_{c-1} = Q_c R_c

    The first is 0 for stochastic matrices; the others tell how fast the streams become equal.
    """
    exponents = over_tokens(kernel.lyapunov_spectrum(mixing.matrices)[None])[0]
    if not mixing.finite.all():
        exponents = np.full_like(exponents, np.nan)
    coords = {"component": np.arange(mixing.num_streams), "reduction": list(REDUCTIONS)}
    return xr.DataArray(exponents, dims=("component", "reduction"), coords=coords)
