"""Can H_res learn? The logits that it is made of: their range, and the gradient that reaches them.

Where H_res is a softmax, or Sinkhorn of the exponential, of logits H̃. They are of the first batch of a
capture; a recording has range and gradients of every measured step.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from depthscope.diagnostics.metrics.declaration import OURS, metric
from depthscope.diagnostics.metrics.mixing import PER_TOKEN
from depthscope.diagnostics.quantities.mixing_matrices import over_tokens, real_tokens
from depthscope.diagnostics.quantities.registry import Unavailable, quantity, ratio

ONE_BATCH = "over all tokens of the first batch of a capture"


@quantity
def logit_ranges(mixing_logits: xr.DataArray, mask: xr.DataArray) -> xr.Variable:
    """Mean over the rows of H_res of the range of its logits, reduced over the real tokens that have any."""
    logits = real_tokens(mixing_logits.transpose(..., "stream_out", "stream_in"), mask)
    known = np.isfinite(logits).all((2, 3)).any(0)
    if not known.any():
        raise Unavailable("no real token of the first batch has logits")
    ranges = (logits[:, known].max(-1) - logits[:, known].min(-1)).mean(-1)
    return xr.Variable(("connection", "reduction"), over_tokens(ranges))


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

    Small for two reasons: logits are so far apart that the projection lets nothing through, or the gradient lies along what
    the projection takes away, as where all streams are equal. NaN where none arrives at H_res.
    """
    return ratio(logit_gradient_norm, mixing_gradient_norm)
