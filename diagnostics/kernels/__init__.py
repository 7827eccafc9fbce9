"""Arrays in, arrays out: every formula of depthscope, on numpy arrays and on torch tensors.

The last two dims are the matrix and all leading dims are batch. Results are float64 on the device of the
input, because Gram matrices and products over depth square the condition number; NaN means undefined and 0 is
a value. Every kernel refuses input with NaN or infinities by a ValueError, unless their rows are masked out.
"""

from depthscope.diagnostics.kernels import geometry, gradients, memory, mixing, rank, similarity

__all__ = ["geometry", "gradients", "memory", "mixing", "rank", "similarity"]
