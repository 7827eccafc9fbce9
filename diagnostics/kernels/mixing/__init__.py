"""What do mixing matrices do to the streams? Kernels of one matrix, and of products over depth.

Shapes: ``L`` depth, ``...`` batch (tokens), ``n`` streams; matrices ``H[..., out, in]``, a row is a
destination. Composites put the later layer on the LEFT: P_{a→b} = H_b … H_{a+1} H_a. Always float64;
products have a running log scale, so that no depth overflows. Matrices that are not square or not finite are
refused with a ValueError.

>>> half = [[0.75, 0.25], [0.25, 0.75]]
>>> composite([half, half]).tolist()
[[0.625, 0.375], [0.375, 0.625]]
"""

from depthscope.diagnostics.kernels.mixing.constraints import Constraint, constraint_errors, named_constraint
from depthscope.diagnostics.kernels.mixing.depth_kernels import depth_kernel
from depthscope.diagnostics.kernels.mixing.gains import (
    Attenuation,
    attenuation,
    backward_gain,
    forward_gain,
    log_backward_gain,
    log_forward_gain,
    operator_gain,
)
from depthscope.diagnostics.kernels.mixing.paths import (
    effective_streams,
    streams_across,
)
from depthscope.diagnostics.kernels.mixing.products import composite, prefix_composites
from depthscope.diagnostics.kernels.mixing.spectra import (
    deflated_gain,
    eigenvalues,
    singular_values,
)
from depthscope.diagnostics.kernels.mixing.stochastic import (
    Violation,
    doubly_stochastic_violation,
    identity_distance,
    sinkhorn,
)

__all__ = [
    "Attenuation",
    "Constraint",
    "Violation",
    "attenuation",
    "backward_gain",
    "composite",
    "constraint_errors",
    "deflated_gain",
    "depth_kernel",
    "doubly_stochastic_violation",
    "effective_streams",
    "eigenvalues",
    "forward_gain",
    "identity_distance",
    "log_backward_gain",
    "log_forward_gain",
    "named_constraint",
    "operator_gain",
    "prefix_composites",
    "singular_values",
    "sinkhorn",
    "streams_across",
]
