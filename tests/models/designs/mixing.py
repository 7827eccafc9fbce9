"""How the published connections parametrise H_res, H_pre and H_post: one class each, apart from how blocks call it.

Each gives, for streams x (B, T, n, D), ``pre`` (B, T, n), ``post`` (B, T, n) and ``res`` (B, T, n, n), destination × source.
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import nn
from torch.nn import functional

from tests.models.designs.parts import STREAMS, WIDTH


class Free(nn.Module):
    """Static and free: HC without its dynamic part (arXiv 2409.19606)."""

    family, constraint = "hc", ""

    def __init__(self, streams: int = STREAMS, width: int = WIDTH):
        super().__init__()
        self.streams = streams
        size = self.num_logits()
        self.base = nn.Parameter(0.5 * torch.randn(2 * streams + size))
        self.project = nn.Parameter(
            torch.randn(streams * width, 2 * streams + size) / (streams * width) ** 0.5
        )

    def num_logits(self) -> int:
        return self.streams**2

    def logits(self, x):
        return self.base.expand(*x.shape[:2], -1)

    def weights(self, x):
        pre, post, res = self.logits(x).split([self.streams, self.streams, self.num_logits()], -1)
        return self.positive(pre), self.positive(post), self.matrix(res)

    def positive(self, logits):
        return logits

    def square(self, logits):
        return logits.unflatten(-1, (self.streams, self.streams))

    def matrix(self, logits):
        return self.square(logits) + torch.eye(self.streams, dtype=logits.dtype)

    def forward(self, x):
        return self.weights(x)


class Dynamic(Free):
    """With a dynamic part: tanh of a linear map of the normed streams."""

    def logits(self, x):
        normed = functional.rms_norm(x.flatten(-2), (x.shape[-1] * x.shape[-2],))
        return self.base + 0.7 * torch.tanh(normed @ self.project)


class Sinkhorn(Dynamic):
    """mHC: twenty rounds of Sinkhorn, rows last (arXiv 2512.24880)."""

    family, constraint = "mhc", "doubly stochastic"

    def positive(self, logits):
        return 2 * torch.sigmoid(logits)

    def matrix(self, logits):
        return sinkhorn(self.square(logits))


def sinkhorn(logits, rounds: int = 20):
    """Doubly stochastic matrices of logits: columns are normalised, then rows."""
    mixed = torch.exp(logits - logits.amax((-1, -2), keepdim=True))
    for _ in range(rounds):
        mixed = mixed / mixed.sum(-2, keepdim=True)
        mixed = mixed / mixed.sum(-1, keepdim=True)
    return mixed


class StaticSinkhorn(Sinkhorn):
    """Only static logits, in the logarithm (as in several ports)."""

    def logits(self, x):
        return self.base.expand(*x.shape[:2], -1)

    def matrix(self, logits):
        mixed = self.square(logits) / 0.5
        for _ in range(20):
            mixed = mixed - mixed.logsumexp(-2, keepdim=True)
            mixed = mixed - mixed.logsumexp(-1, keepdim=True)
        return mixed.exp()


class PermutationMixture(Sinkhorn):
    """mHC-lite: a softmax over all permutations (arXiv 2601.05732)."""

    family, constraint = "mhc|mhc_lite", "doubly stochastic"

    def num_logits(self) -> int:
        return len(list(permutations(range(self.streams))))

    def matrix(self, logits):
        each = torch.eye(self.streams)[torch.tensor(list(permutations(range(self.streams))))]
        return torch.einsum("btp,pij->btij", logits.softmax(-1), each)


class Kronecker(Sinkhorn):
    """KromHC: the Kronecker product of two doubly stochastic matrices of two streams (arXiv 2601.21579)."""

    family, constraint = "mhc|kromhc", "doubly stochastic, Kronecker product"

    def num_logits(self) -> int:
        return 4

    def matrix(self, logits):
        swap = torch.eye(2).flip(0)
        first, second = (
            p[..., :1, None] * torch.eye(2) + p[..., 1:, None] * swap
            for p in logits.unflatten(-1, (2, 2)).softmax(-1).unbind(-2)
        )
        return torch.einsum("btij,btkl->btikjl", first, second).flatten(2, 3).flatten(3, 4)


class Circulant(Sinkhorn):
    """A softmax over the shifts of the streams."""

    family, constraint = "mhc|circulant", "doubly stochastic, circulant"

    def num_logits(self) -> int:
        return self.streams

    def matrix(self, logits):
        shifts = torch.stack([torch.eye(self.streams).roll(k, 0) for k in range(self.streams)])
        return torch.tensordot(logits.softmax(-1), shifts, 1)


class Orthostochastic(Sinkhorn):
    """Squares of the entries of an orthogonal matrix."""

    family = "mhc|orthostochastic"

    def matrix(self, logits):
        skew = self.square(logits) - self.square(logits).mT
        return torch.linalg.matrix_exp(skew).square()


class Orthogonal(Sinkhorn):
    """Cayley's map of a skew matrix (go-mHC, JPmHC)."""

    family, constraint = "hc|orthogonal|orthogonal_hc", "orthogonal"

    def matrix(self, logits):
        skew = self.square(logits) - self.square(logits).mT
        eye = torch.eye(self.streams)
        return torch.linalg.solve(eye + skew, eye - skew)


class Diagonal(Sinkhorn):
    """Each stream has its own factor, and none reads another (dHC)."""

    family, constraint = "hc|diagonal|diagonal_hc", "diagonal"

    def num_logits(self) -> int:
        return self.streams

    def matrix(self, logits):
        return torch.diag_embed(torch.sigmoid(logits + 2))


class Identity(Sinkhorn):
    """No mixing: independent streams (HY4)."""

    family, constraint = "independent_hc|streams", "identity"

    def matrix(self, logits):
        return torch.eye(self.streams).expand(*logits.shape[:2], -1, -1)


class RowStochastic(Sinkhorn):
    """A softmax over the sources: the sums over destinations are free."""

    family, constraint = "hc|row_stochastic", "row-stochastic"

    def matrix(self, logits):
        return self.square(logits).softmax(-1)


class SpectralSphere(Sinkhorn):
    """A matrix of spectral norm one (arXiv 2603.20896)."""

    family, constraint = "hc|spectral", ""

    def matrix(self, logits):
        square = self.square(logits) + torch.eye(self.streams)
        return square / torch.linalg.matrix_norm(square, 2)[..., None, None]


MIXES = {
    "static HC": Free,
    "dynamic HC": Dynamic,
    "mHC": Sinkhorn,
    "static mHC in logarithms": StaticSinkhorn,
    "mHC-lite": PermutationMixture,
    "KromHC": Kronecker,
    "circulant": Circulant,
    "orthostochastic": Orthostochastic,
    "orthogonal": Orthogonal,
    "diagonal": Diagonal,
    "identity": Identity,
    "row stochastic": RowStochastic,
    "spectral sphere": SpectralSphere,
}
