"""How do small changes of a state spread through depth? Jacobian operators and their estimators, by products alone."""

from depthscope.probes.jacobian.by_depth import jacobians_by_depth
from depthscope.probes.jacobian.operator import JacobianOperator, block_jacobians, jacobian

__all__ = ["JacobianOperator", "block_jacobians", "jacobian", "jacobians_by_depth"]
