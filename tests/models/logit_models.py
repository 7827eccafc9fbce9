"""Models of streams whose H_res is made of logits, in several ways of writing that; they keep the logits of the last call."""

from __future__ import annotations

import torch
from torch import nn

N, D, VOCABULARY = 3, 16, 23


def rounds(p, count=20):
    for _ in range(count):
        p = p / p.sum(-2, keepdim=True)
        p = p / p.sum(-1, keepdim=True)
    return p


def by_potentials(z, count=20):
    """Sinkhorn in logarithms, by what is subtracted from rows and columns."""
    u, v = torch.zeros_like(z[..., 0]), torch.zeros_like(z[..., 0, :])
    for _ in range(count):
        v = -torch.logsumexp(z + u.unsqueeze(-1), dim=-2)
        u = -torch.logsumexp(z + v.unsqueeze(-2), dim=-1)
    return torch.exp(z + u.unsqueeze(-1) + v.unsqueeze(-2))


def in_logarithms(z, count=20):
    for _ in range(count):
        z = z - z.logsumexp(-2, keepdim=True)
        z = z - z.logsumexp(-1, keepdim=True)
    return z.exp()


PROJECTIONS = {
    "sinkhorn": lambda z: rounds(z.exp()),
    "stable": lambda z: rounds((z - z.amax((-2, -1), keepdim=True)).exp()),
    "softmax first, with small numbers added": lambda z: rounds(z.softmax(-1) + 1e-6),
    "in logarithms": in_logarithms,
    "potentials": by_potentials,
    "softmax": lambda z: z.softmax(-1),
    "softmax of the other axis": lambda z: z.softmax(-2),
    "turned": lambda z: rounds(z.exp()).mT,
}


class Coefficients(nn.Module):
    """H_pre, H_post and H_res of every token, from all streams of it."""

    def __init__(self, projection: str, spread: float = 1.0, *, static: bool = False):
        super().__init__()
        self.projection, self.static = projection, static
        self.project = nn.Parameter(torch.randn(N * (N + 2), N * D) / 8)
        self.base = nn.Parameter(spread * torch.randn(N * (N + 2)))
        self.gate = nn.Parameter(torch.tensor([0.7, 0.9, 0.8]))
        self.logits = self.matrix = None

    def forward(self, x):
        raw = nn.functional.linear(nn.functional.layer_norm(x.flatten(-2), (N * D,)), self.project)
        pre, post, res = raw.split([N, N, N * N], dim=-1)
        base = self.base.split([N, N, N * N])
        h_pre = torch.sigmoid(self.gate[0] * pre + base[0])
        h_post = 2 * torch.sigmoid(self.gate[1] * post + base[1])
        z = base[2] if self.static else self.gate[2] * res + base[2]
        self.logits = z.unflatten(-1, (N, N))
        self.matrix = PROJECTIONS[self.projection](self.logits)
        if torch.is_grad_enabled() and self.logits.requires_grad:
            for tensor in (self.logits, self.matrix):
                tensor.retain_grad()
        return h_pre, h_post, self.matrix


class Connection(nn.Module):
    """Returns what the branch reads, and the weights that write and mix."""

    def __init__(self, coefficients):
        super().__init__()
        self.coefficients = coefficients

    def forward(self, x):
        h_pre, h_post, mix = self.coefficients(x)
        return torch.einsum("btn,btnd->btd", h_pre, x), h_post, mix


class Block(nn.Module):
    """One connection around an MLP; ``local``: all weights are local variables of this forward."""

    def __init__(self, coefficients, *, local: bool, transposed: bool):
        super().__init__()
        self.coefficients, self.local, self.transposed = coefficients, local, transposed
        self.connection = None if local else Connection(coefficients)
        self.branch = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Tanh())

    def forward(self, x):
        if self.local:
            h_pre, h_post, mix = Coefficients.forward(self.coefficients, x)
            taken = (h_pre.unsqueeze(-1) * x).sum(2)
        else:
            taken, h_post, mix = self.connection(x)
        return torch.matmul(mix.mT if self.transposed else mix, x) + h_post.unsqueeze(-1) * self.branch(
            taken
        ).unsqueeze(2)


class LogitModel(nn.Module):
    """Blocks of three streams that begin different, their mean and a head."""

    def __init__(
        self,
        projection: str = "sinkhorn",
        *,
        local=False,
        layers=3,
        spread=1.0,
        static=False,
        transposed=False,
    ):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, D)
        self.start = nn.Parameter(torch.randn(N, D))
        self.layers = nn.ModuleList(
            Block(Coefficients(projection, spread, static=static), local=local, transposed=transposed)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, VOCABULARY)

    @property
    def coefficients(self) -> list[Coefficients]:
        return [layer.coefficients for layer in self.layers]

    def forward(self, ids):
        x = self.embed(ids).unsqueeze(2) * self.start
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x.mean(2)))


def loss(output, ids):
    return nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def ids(sequences: int = 4, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))
