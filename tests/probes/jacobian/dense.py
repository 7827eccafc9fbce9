"""An operator as a matrix."""

from __future__ import annotations

import torch

from depthscope.probes.jacobian.operator import JacobianOperator


def dense(op: JacobianOperator) -> torch.Tensor:
    """The matrix of an operator from its rows, checked against its columns."""
    rows = torch.stack([op.rmatvec(u) for u in torch.eye(op.shape[0], dtype=torch.float64)])
    columns = torch.stack([op.matvec(v) for v in torch.eye(op.shape[1], dtype=torch.float64)], dim=1)
    torch.testing.assert_close(rows, columns, atol=1e-5, rtol=1e-4)
    return rows


def own_blocks(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """A dense Jacobian without the blocks between different tokens."""
    tokens = len(matrix) // width
    return matrix * torch.kron(torch.eye(tokens), torch.ones(width, width)).to(matrix.dtype)
