"""Did training move the mixing? Distances from what initialisation and weight decay alone make of its logits.

Matrices are compared, not logits: Sinkhorn gives the same matrix for logits that differ by a constant in each row and
each column.
"""

from __future__ import annotations

import math

import numpy as np
import xarray as xr

from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.diagnostics.metrics.contraction import gain_of
from depthscope.diagnostics.metrics.declaration import metric
from depthscope.diagnostics.metrics.mixing import PER_TOKEN
from depthscope.diagnostics.quantities.mixing_matrices import Mixing


def _distance(mixing: Mixing, matrices: np.ndarray) -> xr.Variable:
    """‖H − M‖_F/√n of every token's H from a static M (C, n, n)."""
    # A static matrix has no tokens: the same M is compared with the H of each.
    distance = np.linalg.norm(mixing.matrices - matrices[:, None], axis=(-2, -1))
    # √n is the norm of the identity: so distances are comparable between numbers of streams, as `identity_distance`.
    return mixing.reduced(distance / math.sqrt(mixing.num_streams))


@metric(
    symbol=r"\|H - H_0\|_F / \sqrt{n}",
    dims="connection reduction",
    cite="xie2025mhc",
    basis="stream",
    null=0.0,
    estimator=PER_TOKEN,
)
def initial_distance(mixing: Mixing, initial_matrices: np.ndarray) -> xr.Variable:
    """Distance of a connection from the matrix of its initial static logits: 0 where it has not moved."""
    return _distance(mixing, initial_matrices)


@metric(
    symbol=r"\sigma_1(P_{\eta\lambda}|_{1^\perp})",
    # No dim `reduction`: static matrices are the same for every token.
    dims="connection",
    scale="log",
    cite="seneta2006nonnegative",
    basis="stream",
    null=1.0,
    estimator="static matrices in float64",
)
def replayed_deflated_gain(
    mixing: Mixing, initial_logits: xr.DataArray, replayed_matrices: np.ndarray
) -> xr.Variable:
    """What initialisation and weight decay alone leave of the differences between streams, as the deflated gain."""
    left = gain_of(kernel.deflated_gain(replayed_matrices))
    # The decay goes with it: the verdict `decayed_mixing` names it.
    return xr.Variable(("connection",), left, {"decay": initial_logits.attrs["decay"]})
