"""What do the connections do to the streams? Gains, spectra and products of H_res, and who reads whom."""

from __future__ import annotations

import numpy as np
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.diagnostics.metrics.declaration import Range, metric
from depthscope.diagnostics.quantities.mixing_matrices import REDUCTIONS, Mixing, plain

PER_TOKEN = "per token in float64, then reduced over tokens"
PER_PRODUCT = "product per token in float64, then reduced over tokens"
DIRECTIONS = ("forward", "backward")
# Tokens of one block of products that are not kept.
TOKENS = 1024

GAIN = Range(low=0.5, high=10.0, source="xie2025mhc")


def exponential(logarithms: np.ndarray) -> np.ndarray:
    """e^x, infinite where it exceeds float64.

    Parameters
    ----------
    logarithms : ndarray
        Any.

    Returns
    -------
    ndarray
    """
    with np.errstate(over="ignore"):
        return np.exp(logarithms)


def _by_direction(parts: list[xr.DataArray]) -> xr.DataArray:
    """Forward and backward values put together."""
    return xr.concat(parts, xr.Variable("direction", list(DIRECTIONS)))


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
)
def mixing_gain(mixing: Mixing) -> xr.DataArray:
    r"""Amax gain of one connection: the largest signed row sum forward, column sum backward.

    .. math:: \max_i |\textstyle\sum_j H_{ij}| \quad\text{and}\quad \max_j |\sum_i H_{ij}|

    1 for a doubly stochastic matrix. Signed sums hide cancellation: read the singular values too.
    """
    gains = (kernel.forward_gain, kernel.backward_gain)
    found = _by_direction([mixing.reduced(mixing.each(gain)) for gain in gains])
    return found.assign_attrs({schema.NOT_FINITE: mixing.spoilt} if mixing.spoilt else {})


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
)
def composite_gain(mixing: Mixing) -> xr.DataArray:
    r"""Amax gain of the product of all connections from the embedding on.

    .. math:: P = H_c \cdots H_2 H_1

    The mHC paper reports about 3000 for a 27B HC and 1.6 for mHC.
    """
    return _by_direction([mixing.reduced(gain, composed=True) for gain in _prefix_gains(mixing)])


def _prefix_gains(mixing: Mixing) -> list[np.ndarray]:
    gains = (kernel.log_forward_gain, kernel.log_backward_gain)
    return [exponential(mixing.each_product(gain)) for gain in gains]


@metric(
    symbol=r"\max_i |\sum_j (H_b \cdots H_a)_{ij}|",
    dims="direction connection other_connection reduction",
    scale="log",
    healthy=GAIN,
    cite="xie2025mhc",
    basis="stream",
    null=1.0,
    estimator=PER_PRODUCT,
)
def pair_gain(mixing: Mixing, pair_gains: np.ndarray) -> xr.DataArray:
    r"""Amax gain of the product between any two connections.

    .. math:: H_b \cdots H_{a+1} H_a

    ``connection`` is a, ``other_connection`` is b; NaN where a > b. The last b gives what the gradient has gone
    through down to a.
    """
    broken = np.concatenate([[0], np.cumsum(~mixing.finite)])
    across = broken[None, 1:] - broken[:-1, None] > 0
    dims = ("direction", "connection", "other_connection", "reduction")
    known = np.where(across[..., None], np.nan, pair_gains)
    return mixing.labelled(known, dims, direction=list(DIRECTIONS), reduction=list(REDUCTIONS))


@metric(
    symbol=r"\sigma_i(H)",
    dims="connection component reduction",
    healthy=Range(high=1.05, source="xie2025mhc"),
    cite="xie2025mhc",
    basis="stream",
    null=1.0,
    estimator=PER_TOKEN,
)
def mixing_singular_value(mixing: Mixing, connection_spectrum: np.ndarray) -> xr.DataArray:
    """Singular values of one connection, the largest first.

    The largest is the spectral norm: 1 for a doubly stochastic matrix, above it the connection expands.
    """
    return _components(mixing, connection_spectrum)


@metric(
    symbol=r"\sigma_i(P)",
    dims="connection component reduction",
    scale="log",
    healthy=Range(high=1.05, source="xie2025mhc"),
    cite="xie2025mhc",
    basis="stream",
    null=1.0,
    estimator=PER_PRODUCT,
)
def composite_singular_value(mixing: Mixing) -> xr.DataArray:
    """Singular values of the product of all connections from the embedding on, the largest first."""
    product, scale = mixing.prefix
    values = plain(kernel.singular_values(product), scale[..., None])
    return _components(mixing, values, composed=True)


@metric(
    symbol=r"|\lambda_i(H)|",
    dims="connection component reduction",
    healthy=Range(high=1.05, source="heuristic"),
    cite="seneta2006nonnegative",
    basis="stream",
    null=1.0,
    estimator=PER_TOKEN,
)
def mixing_eigenvalue_modulus(mixing: Mixing, eigenvalue_moduli: np.ndarray) -> xr.DataArray:
    """Magnitudes of the eigenvalues of one connection, the largest first.

    The second tells how fast repeated mixing makes the streams equal: to 1 % after ln 0.01 / ln|λ₂| layers.
    """
    return _components(mixing, eigenvalue_moduli)


def _components(mixing: Mixing, values: np.ndarray, *, composed: bool = False) -> xr.DataArray:
    return mixing.reduced(values, ("component",), composed=composed, component=np.arange(mixing.num_streams))


@metric(
    symbol=r"\|\Sigma_j H_{ij} - 1\|_\infty",
    dims="kind connection reduction",
    scale="log",
    healthy=Range(high=1e-2, source="xie2025mhc"),
    cite="sinkhorn1967concerning",
    basis="stream",
    null=0.0,
    estimator=PER_TOKEN,
    headline=True,
)
def doubly_stochastic_violation(mixing: Mixing) -> xr.DataArray:
    """Distance from doubly stochastic: worst row sum, worst column sum, most negative entry.

    Sinkhorn ends on one side, whose sums are exact; all error of stopping early sits in the other.
    """
    kinds = kernel.Violation._fields
    parts = mixing.each(lambda h: np.stack(kernel.doubly_stochastic_violation(h), axis=-1))
    found = [mixing.reduced(parts[..., k]) for k in range(len(kinds))]
    return xr.concat(found, xr.Variable("kind", list(kinds)))


def _weakest(p: np.ndarray) -> np.ndarray:
    """Weakest row sum and weakest column sum, (..., 2)."""
    found = kernel.attenuation(p)
    return np.stack([found.row, found.column], axis=-1)


@metric(
    symbol=r"\min_i |\sum_j P_{ij}|",
    dims="direction connection reduction",
    scale="log",
    healthy=Range(low=0.5, source="heuristic"),
    cite="xie2025mhc",
    basis="stream",
    null=1.0,
    estimator=PER_PRODUCT,
)
def composite_attenuation(mixing: Mixing) -> xr.DataArray:
    r"""Weakest sum of the product of all connections: what the largest one hides.

    .. math:: \min_i |\textstyle\sum_j P_{ij}| \quad\text{and backward}\quad \min_j |\sum_i P_{ij}|
    """
    weakest = mixing.each_product(lambda p, scale: plain(_weakest(p), scale[..., None]))
    return _by_direction([mixing.reduced(weakest[..., side], composed=True) for side in (0, 1)])


@metric(
    symbol=r"\min_i |\sum_j H_{ij}|",
    dims="direction connection reduction",
    scale="log",
    healthy=Range(low=0.5, source="heuristic"),
    cite="xie2025mhc",
    basis="stream",
    null=1.0,
    estimator=PER_TOKEN,
)
def mixing_attenuation(mixing: Mixing) -> xr.DataArray:
    r"""Weakest sum of one connection: the stream, or the gradient, that it fades most.

    .. math:: \min_i |\textstyle\sum_j H_{ij}| \quad\text{and backward}\quad \min_j |\sum_i H_{ij}|
    """
    weakest = mixing.each(_weakest)
    return _by_direction([mixing.reduced(weakest[..., side]) for side in (0, 1)])


@metric(
    symbol=r"\max |\ln |\textstyle\sum P||",
    dims="connection reduction",
    units="nat",
    healthy=Range(high=0.7, source="heuristic"),
    cite="xie2025mhc",
    basis="stream",
    null=0.0,
    estimator=PER_PRODUCT,
    infinite=True,
)
def composite_deviation(mixing: Mixing) -> xr.DataArray:
    r"""Largest distance of any row or column sum of the product of all connections from 1, up or down.

    .. math:: \max \big|\ln |\textstyle\sum_j P_{ij}|\big|, \big|\ln |\sum_i P_{ij}|\big|

    0 for doubly stochastic connections; infinite where a sum cancels to nothing.
    """
    return mixing.reduced(mixing.each_product(kernel.log_deviation), composed=True)


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
def composite_dobrushin(mixing: Mixing) -> xr.DataArray:
    r"""Dobrushin coefficient of the product of all connections: the share of differences that may survive.

    .. math:: \tau(P) = \tfrac{1}{2} \max_{i,k} \textstyle\sum_j |P_{ij} - P_{kj}|

    It stops at rounding, near 1e-16; the deflated gain goes on below.
    """
    share = mixing.each_product(lambda p, scale: plain(kernel.dobrushin(p), scale))
    return mixing.reduced(share, composed=True)


def _left_of_differences(mixing: Mixing, *, reverse: bool = False) -> np.ndarray:
    """Log₁₀ of the deflated gain (C, N), a block of tokens at a time."""
    blocks = np.array_split(mixing.matrices, -(-mixing.matrices.shape[1] // TOKENS), axis=1)
    return np.concatenate([kernel.deflated_gain(h, reverse=reverse) for h in blocks], axis=1) / np.log(10.0)


@metric(
    symbol=r"\log_{10} \sigma_1(P|_{1^\perp})",
    dims="connection reduction",
    healthy=Range(low=-2.0, source="heuristic"),
    cite="seneta2006nonnegative",
    basis="stream",
    null=0.0,
    estimator=PER_PRODUCT,
    infinite=True,
    headline=True,
)
def deflated_gain(mixing: Mixing) -> xr.DataArray:
    r"""What is left of the differences between streams: log₁₀ of the product's norm off the mean.

    .. math:: \log_{10} \sigma_1\Big(\prod_l U^\top H_l U\Big), \quad U \text{ a basis of } 1^\perp

    Below −2 all streams carry the same part of the embedding; −inf for exactly nothing.
    """
    return mixing.reduced(_left_of_differences(mixing), composed=True)


@metric(
    symbol=r"\log_{10} \sigma_1(S|_{1^\perp})",
    dims="connection reduction",
    healthy=Range(low=-2.0, source="heuristic"),
    cite="seneta2006nonnegative",
    basis="stream",
    null=0.0,
    estimator=PER_PRODUCT,
    infinite=True,
)
def suffix_deflated_gain(mixing: Mixing) -> xr.DataArray:
    r"""What is left of a difference between streams on its way to the head: the product from a connection on.

    .. math:: S = H_C \cdots H_{c+1} H_c, \quad \log_{10} \sigma_1\big(U^\top S\, U\big) \text{ by products of } U^\top H U

    Below −2 what a connection writes to one stream reaches the head as if written to all.
    """
    return mixing.reduced(_left_of_differences(mixing, reverse=True), onward=True)


@metric(
    symbol=r"\|H - I\|_F / \sqrt{n}",
    dims="connection reduction",
    healthy=Range(low=0.05, source="heuristic"),
    cite="zhu2024hyper",
    basis="stream",
    null=0.0,
    estimator=PER_TOKEN,
    headline=True,
)
def identity_distance(mixing: Mixing) -> xr.DataArray:
    """Distance of a connection from the identity: 0 where the streams do not mix."""
    return mixing.reduced(mixing.each(kernel.identity_distance))


def _uniform_entropy(mixing: Mixing) -> xr.DataArray:
    """The entropy ln n of uniform mixing."""
    return mixing.labelled(np.full(len(mixing), np.log(mixing.num_streams)), ("connection",))


@metric(
    symbol=r"H(\text{rows})",
    dims="connection reduction",
    units="nat",
    cite="seneta2006nonnegative",
    basis="stream",
    null=_uniform_entropy,
    estimator=PER_TOKEN,
    headline=True,
)
def mixing_entropy(mixing: Mixing) -> xr.DataArray:
    """Mean entropy of the rows: 0 for a permutation or the identity, ln n for uniform mixing."""
    return mixing.reduced(mixing.each(kernel.mixing_entropy))


@metric(
    symbol=r"\overline{|M_{kj}|}",
    dims="connection other_connection",
    cite="zhu2024hyper",
    basis="invariant",
    null=1.0,
    estimator="per token in float64, then the mean of the magnitude over tokens",
)
def depth_kernel(mixing: Mixing, mean_depth_kernel: np.ndarray) -> xr.DataArray:
    r"""How much of an earlier output a connection reads, through all mixing between.

    .. math:: M_{kj} = H^{pre}_k \Big(\prod_{t=j+1}^{k-1} H^{res}_t\Big) H^{post\,\top}_j

    ``connection`` is the reader k, ``other_connection`` the source j; 0 for j ≥ k. A plain residual network
    has 1 below the diagonal. It does not change with the basis of the streams.
    """
    return mixing.labelled(mean_depth_kernel, ("connection", "other_connection"))


def _equal_share(mixing: Mixing) -> xr.DataArray:
    """1/n."""
    return mixing.labelled(np.full(len(mixing), 1.0 / mixing.num_streams), ("connection",))


def _shares(mixing: Mixing, weights: np.ndarray) -> xr.DataArray:
    shares = np.stack([kernel.stream_shares(of_connection) for of_connection in weights])
    return mixing.labelled(shares, ("connection", "stream"), stream=list(map(str, range(mixing.num_streams))))


@metric(
    symbol=r"|H^{pre}_s| / \sum_s |H^{pre}_s|",
    dims="connection stream",
    cite="zhu2024hyper",
    basis="stream",
    null=_equal_share,
    estimator="ratio of sums over tokens",
)
def read_share(mixing: Mixing, read_weights: np.ndarray) -> xr.DataArray:
    """Share of each stream in what a connection reads."""
    return _shares(mixing, read_weights)


@metric(
    symbol=r"|H^{post}_s| / \sum_s |H^{post}_s|",
    dims="connection stream",
    cite="zhu2024hyper",
    basis="stream",
    null=_equal_share,
    estimator="ratio of sums over tokens",
)
def write_share(mixing: Mixing, write_weights: np.ndarray) -> xr.DataArray:
    """Share of each stream in what a connection writes."""
    return _shares(mixing, write_weights)
