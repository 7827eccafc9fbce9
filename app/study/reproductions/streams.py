"""How else can streams be mixed without loss? Connections whose H_res is doubly stochastic by construction."""

from __future__ import annotations

import math
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import nn

from depthscope.diagnostics.errors import InputError

# Shapes: B sequences, N streams, T tokens, D features.

# Of H_res at the start in the package's mHC with four streams; the other maps begin there, so that only the map differs.
DIAGONAL = 0.475
NEAR_IDENTITY = 0.98
# As in the mHC paper: what depends on the token begins small.
DYNAMIC_SCALE = 0.01
# Of the read and write logits, where the streams are to differ from the start.
BROKEN = 1.0


class Permutations(nn.Module):
    """mHC-lite (2601.05732): H_res is a mixture of all N! permutation matrices, weights by a softmax.

    ``streams``: N; 24 matrices for four.
    ``diagonal``: of H_res where the logits are those of the start.
    """

    matrices: torch.Tensor
    start: torch.Tensor

    def __init__(self, streams: int, diagonal: float):
        super().__init__()
        orders = torch.tensor(list(permutations(range(streams))))
        self.register_buffer("matrices", F.one_hot(orders, streams).float())
        start = torch.zeros(len(orders))
        # A mixture q I + (1 − q) J/N, whose other permutations all have the same weight; the identity is the first of them.
        identity = (diagonal * streams - 1) / (streams - 1)
        start[0] = math.log((identity + (1 - identity) / len(orders)) / ((1 - identity) / len(orders)))
        self.start = start

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """H_res (…, N, N) of logits (…, N!)."""
        return torch.einsum("...p,pij->...ij", logits.softmax(-1), self.matrices)


class Kronecker(nn.Module):
    """KromHC (2601.21579): H_res is a Kronecker product of 2 × 2 doubly stochastic matrices.

    ``streams``: N, a power of 2.
    ``diagonal``: of H_res where the logits are those of the start.
    """

    start: torch.Tensor

    def __init__(self, streams: int, diagonal: float):
        super().__init__()
        factors = streams.bit_length() - 1
        if streams != 2**factors or not factors:
            raise InputError(
                f"got {streams} streams; Kronecker products of 2 × 2 need a power of 2 from 2 on"
            )
        kept = diagonal ** (1 / factors)
        self.start = torch.full((factors,), math.log(kept / (1 - kept)))

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """H_res (…, N, N) of logits (…, log₂ N).

        ``logits``: one for each factor [[p, 1 − p], [1 − p, p]], p = σ(logit).
        """
        kept = torch.sigmoid(logits)
        factors = torch.stack((kept, 1 - kept, 1 - kept, kept), -1).unflatten(-1, (2, 2)).unbind(-3)
        product = factors[0]
        for factor in factors[1:]:
            product = torch.einsum("...ij,...kl->...ikjl", product, factor).flatten(-4, -3).flatten(-2, -1)
        return product


MAPS: dict[str, type[Permutations | Kronecker]] = {"mhc-lite": Permutations, "kromhc": Kronecker}
"""From logits to H_res, by the name of the family."""


class StreamConnection(nn.Module):
    """x ← H_res x + H_postᵀ F(H_pre x) with H_pre = σ(·), H_post = 2σ(·), and logits that depend on the token.

    ``streams``: N.
    ``dim``: features of a stream.
    ``branch``: F, with its own norm.
    ``layer_index``: taken as the package's connections take it; nothing depends on it.
    ``mixing``: a key of `MAPS`.
    ``diagonal``: of H_res at the start.
    ``broken``: spread of the read and write logits at the start over the streams: 0 treats all the same.
    """

    def __init__(
        self,
        streams: int,
        *,
        dim: int,
        branch: nn.Module,
        layer_index: int = 0,
        mixing: str = "mhc-lite",
        diagonal: float = DIAGONAL,
        broken: float = 0.0,
    ):
        super().__init__()
        self.branch, self.streams = branch, streams
        self.norm = nn.RMSNorm(streams * dim, elementwise_affine=False)
        self.mixing = MAPS[mixing](streams, diagonal)
        # Each branch reads the mean of the streams and adds its output to every one: copies then act as a plain residual.
        read = torch.full((streams,), -math.log(streams - 1)) + broken * torch.randn(streams)
        write = broken * torch.randn(streams)
        self.sizes = (streams, streams, len(self.mixing.start))
        self.static = nn.Parameter(torch.cat((read, write, self.mixing.start)))
        self.dynamic = nn.Parameter(torch.randn(streams * dim, sum(self.sizes)) / math.sqrt(streams * dim))
        self.scale = nn.Parameter(torch.full((3,), DYNAMIC_SCALE))

    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        """Carry the streams through one branch.

        ``packed``: (B·N, T, D), the streams of a sequence next to each other, as the package has them.
        """
        x_BTND = packed.unflatten(0, (-1, self.streams)).permute(0, 2, 1, 3)
        scale = torch.repeat_interleave(self.scale, torch.tensor(self.sizes))
        logits = self.static + scale * (self.norm(x_BTND.flatten(-2)) @ self.dynamic)
        read, write, mix = logits.split(self.sizes, dim=-1)
        branch_in = torch.einsum("btn,btnd->btd", torch.sigmoid(read), x_BTND)
        mixed = torch.einsum("btij,btjd->btid", self.mixing(mix), x_BTND)
        written = mixed + 2 * torch.sigmoid(write).unsqueeze(-1) * self.branch(branch_in).unsqueeze(-2)
        return written.permute(0, 2, 1, 3).flatten(0, 1)
