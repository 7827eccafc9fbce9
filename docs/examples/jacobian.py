"""The whole Jacobian of one block by torch.func: every singular value, its determinant, Lyapunov exponents.

python docs/examples/jacobian.py
"""

import torch
from torch import nn


class Block(nn.Module):
    """One pre-norm block of width 16."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the branch to the state."""
        return x + self.mlp(self.norm(x))


torch.manual_seed(0)
block, state = Block(), torch.randn(16)
parameters = {name: value.detach() for name, value in block.named_parameters()}

# One token: (16, 16). For a sequence, flatten the state and reshape inside.
jacobian = torch.func.jacrev(lambda x: torch.func.functional_call(block, parameters, (x,)))(state)
print("singular values", torch.linalg.svdvals(jacobian)[:4].tolist())
print("log |det J|", float(torch.linalg.slogdet(jacobian).logabsdet))

# Lyapunov exponents of many equal blocks: QR at each step keeps the directions apart.
basis, logs = torch.eye(16), torch.zeros(16)
for _ in range(32):
    jacobian = torch.func.jacrev(lambda x: torch.func.functional_call(block, parameters, (x,)))(state)
    basis, triangle = torch.linalg.qr(jacobian @ basis)
    logs += triangle.diagonal().abs().log()
    state = block(state).detach()
print("largest Lyapunov exponent", float(logs.max() / 32))
