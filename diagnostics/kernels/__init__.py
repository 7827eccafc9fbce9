"""Arrays in, arrays out: every formula of depthscope, on numpy arrays and on torch tensors alike.

The last two dims are the matrix and all leading dims are batch. Results are float64 on the device of the
input; NaN means undefined and 0 is a value. Input that holds NaN or infinities is refused unless its rows
are masked out.
"""

from depthscope.diagnostics.kernels import geometry, gradients, meanfield, mixing, rank, similarity

__all__ = ["geometry", "gradients", "meanfield", "mixing", "rank", "similarity"]
