"""A model of streams whose H_res is Sinkhorn of logits; it keeps the matrices of the last call."""

from __future__ import annotations

import torch
from torch import nn

N, D, VOCABULARY = 3, 16, 23


def sinkhorn(z, count=20):
    p = z.exp()
    for _ in range(count):
        p = p / p.sum(-2, keepdim=True)
        p = p / p.sum(-1, keepdim=True)
    return p


class Coefficients(nn.Module):
    """H_pre, H_post and H_res of every token, from all streams of it."""

    def __init__(self):
        super().__init__()
        self.project = nn.Parameter(torch.randn(N * (N + 2), N * D) / 8)
        self.base = nn.Parameter(torch.randn(N * (N + 2)))
        self.gate = nn.Parameter(torch.tensor([0.7, 0.9, 0.8]))
        self.matrix = None

    def forward(self, x):
        raw = nn.functional.linear(nn.functional.layer_norm(x.flatten(-2), (N * D,)), self.project)
        pre, post, res = raw.split([N, N, N * N], dim=-1)
        base = self.base.split([N, N, N * N])
        h_pre = torch.sigmoid(self.gate[0] * pre + base[0])
        h_post = 2 * torch.sigmoid(self.gate[1] * post + base[1])
        self.matrix = sinkhorn((self.gate[2] * res + base[2]).unflatten(-1, (N, N)))
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
    """One connection around an MLP."""

    def __init__(self):
        super().__init__()
        self.coefficients = Coefficients()
        self.connection = Connection(self.coefficients)
        self.branch = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Tanh())

    def forward(self, x):
        taken, h_post, mix = self.connection(x)
        return torch.matmul(mix, x) + h_post.unsqueeze(-1) * self.branch(taken).unsqueeze(2)


class SinkhornModel(nn.Module):
    """Three blocks of three streams that begin different, their mean and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, D)
        self.start = nn.Parameter(torch.randn(N, D))
        self.layers = nn.ModuleList(Block() for _ in range(3))
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
