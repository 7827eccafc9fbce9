"""Can H_res learn? The logits that it is made of: their range, their saturation, and the gradient that reaches them.

Where H_res is a softmax, or Sinkhorn of the exponential, of logits H̃. They are of the first batch of a
capture; a recording has range and gradients of every measured step.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.diagnostics.metrics.declaration import OURS, metric
from depthscope.diagnostics.metrics.mixing import PER_TOKEN
from depthscope.diagnostics.quantities.mixing_matrices import over_tokens, real_tokens
from depthscope.diagnostics.quantities.registry import Unavailable, quantity, ratio

ONE_BATCH = "over all tokens of the first batch of a capture"
NO_STOCHASTIC = (
    "neither the rows nor the columns of H_res sum to 1: no softmax, and not Sinkhorn, has made it"
)
# Of sums from 1, up to which a matrix counts as normalised along an axis; truncated Sinkhorn stays below it. Heuristic.
NORMALISED = 0.05


def _followed(mixing_logits: xr.DataArray, mask: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Logits (C, N, n, n) of the real tokens that have any, and which of all real tokens these are."""
    logits = real_tokens(mixing_logits.transpose(..., "stream_out", "stream_in"), mask)
    known = np.isfinite(logits).all((2, 3)).any(0)
    if not known.any():
        raise Unavailable("no real token of the first batch has logits")
    return logits[:, known], known


def _by_connection(values: np.ndarray) -> xr.Variable:
    """Values (C, N) reduced over the tokens."""
    return xr.Variable(("connection", "reduction"), over_tokens(values))


@quantity
def logit_ranges(mixing_logits: xr.DataArray, mask: xr.DataArray) -> xr.Variable:
    """Mean over the rows of H_res of the range of its logits, reduced over tokens."""
    logits, _ = _followed(mixing_logits, mask)
    return _by_connection((logits.max(-1) - logits.min(-1)).mean(-1))


@metric(
    symbol=r"\overline{\max_j \tilde H_{ij} - \min_j \tilde H_{ij}}",
    dims="connection reduction",
    units="nat",
    cite=OURS,
    basis="stream",
    null=0.0,
    estimator=PER_TOKEN,
)
def logit_range(logit_ranges: xr.Variable) -> xr.Variable:
    r"""Range of the logits in a row of H_res, mean over its rows: how far apart its entries can be.

    .. math:: \frac{1}{n} \textstyle\sum_i (\max_j \tilde H_{ij} - \min_j \tilde H_{ij})

    H̃ is what the exponential takes. The null is a uniform H_res. Where one entry of each row is larger by 8 than the others,
    a softmax leaves these 3e-4, and as much of their gradient.
    """
    return logit_ranges


@metric(
    symbol=r"1 - \operatorname{tr} J(H) / \operatorname{tr} J(1/n)",
    dims="connection reduction",
    cite=OURS,
    basis="stream",
    null=0.0,
    estimator=PER_TOKEN,
)
def logit_saturation(projected_matrices: np.ndarray) -> xr.Variable:
    r"""Saturation of the projection: how much less of a gradient it lets through than at a uniform H_res.

    .. math:: 1 - \frac{\operatorname{tr} J(H)}{\operatorname{tr} J(1/n)}, \qquad J = \frac{\partial H}{\partial \tilde H}

    0 at a uniform matrix, 1 at a permutation, whose logits get no gradient whatever the loss. J is that of Sinkhorn in its
    limit where rows and columns of H_res sum to 1 (within 0.05), else that of a softmax along the axis that does. It depends
    on H_res alone, and not on the gradient that arrives.
    """
    known = np.isfinite(projected_matrices).all((2, 3))
    found = np.full(known.shape, np.nan)
    if known.any():
        found[known] = _saturation(projected_matrices[known])
    return _by_connection(found)


@quantity
def projected_matrices(h_res: xr.DataArray, mixing_logits: xr.DataArray, mask: xr.DataArray) -> np.ndarray:
    """H_res (C, N, n, n) of the real tokens whose logits were followed; NaN where the logits are not known."""
    logits, known = _followed(mixing_logits, mask)
    matrices = real_tokens(h_res.transpose(..., "stream_out", "stream_in"), mask)[:, known]
    matrices[~np.isfinite(logits).all((2, 3))] = np.nan
    return matrices


def _saturation(matrices: np.ndarray) -> np.ndarray:
    """Saturation (N,) of the projection that gave the matrices (N, n, n).

    Raises Unavailable: Where neither rows nor columns of all of them sum to 1.
    """
    rows, columns = (abs(matrices.sum(axis) - 1).max() <= NORMALISED for axis in (-1, -2))
    if rows and columns:
        return 1.0 - kernel.sinkhorn_sensitivity(matrices)
    if rows or columns:
        return 1.0 - kernel.softmax_sensitivity(matrices if rows else matrices.swapaxes(-1, -2))
    raise Unavailable(NO_STOCHASTIC)


@metric(
    symbol=r"\|\partial \mathcal{L} / \partial \tilde H\|_F",
    dims="connection",
    scale="log",
    units="loss per nat",
    cite=OURS,
    basis="stream",
    null="none: the scale is the loss's; compare connections, and with the gradient at H_res",
    estimator=ONE_BATCH,
    smooth=False,  # one number for a batch, whichever of its sequences are left out
)
def logit_gradient(logit_gradient_norm: xr.DataArray) -> xr.DataArray:
    r"""Norm of the gradient of the loss with respect to the logits of H_res.

    .. math:: \|\partial \mathcal{L} / \partial \tilde H\|_F
    """
    return logit_gradient_norm


@metric(
    symbol=r"\|\partial \mathcal{L} / \partial H\|_F",
    dims="connection",
    scale="log",
    units="loss",
    cite=OURS,
    basis="stream",
    null="none: the scale is the loss's; compare connections",
    estimator=ONE_BATCH,
    smooth=False,  # one number for a batch, whichever of its sequences are left out
)
def mixing_gradient(mixing_gradient_norm: xr.DataArray) -> xr.DataArray:
    r"""Norm of the gradient of the loss with respect to H_res itself.

    .. math:: \|\partial \mathcal{L} / \partial H\|_F
    """
    return mixing_gradient_norm


@metric(
    symbol=r"\|\partial \mathcal{L} / \partial \tilde H\|_F / \|\partial \mathcal{L} / \partial H\|_F",
    dims="connection",
    scale="log",
    cite=OURS,
    basis="stream",
    null="none: 1/n at most for a uniform H_res, times the part of the gradient that keeps its sums",
    estimator=ONE_BATCH,
    smooth=False,  # one number for a batch, whichever of its sequences are left out
)
def logit_gradient_share(
    logit_gradient_norm: xr.DataArray, mixing_gradient_norm: xr.DataArray
) -> xr.DataArray:
    r"""Share of the gradient of H_res that reaches its logits: what the projection lets through.

    .. math:: \frac{\|\partial \mathcal{L} / \partial \tilde H\|_F}{\|\partial \mathcal{L} / \partial H\|_F}

    Small for two reasons, which `logit_saturation` distinguishes: the projection is saturated, or the gradient lies along what
    the projection takes away, as where all streams are equal. NaN where none arrives at H_res.
    """
    return ratio(logit_gradient_norm, mixing_gradient_norm)
