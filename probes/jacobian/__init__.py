"""How do each block and all blocks together stretch small changes of the state? Singular values of their Jacobians."""

from depthscope.probes.jacobian.singular_values import jacobian

__all__ = ["jacobian"]
