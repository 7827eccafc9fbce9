"""A causal language model whose connections are local variables, written twice: as it is, and with another mixing by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

VOCABULARY, WIDTH, STREAMS = 41, 16, 3
Mixing = Callable[[int, torch.Tensor], torch.Tensor]


class CausalMean(nn.Module):
    """Every token reads the mean of those up to itself."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        steps = torch.arange(1, x.shape[1] + 1)[:, None]
        return torch.tanh(self.out(self.norm(x).cumsum(1) / steps))


class LocalBlock(nn.Module):
    """X' = H(X) X + w ⊗ F(r · X), with a doubly stochastic H that depends on the token."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number
        self.branch = CausalMean()
        self.route = nn.Linear(STREAMS * WIDTH, 2)
        self.read, self.write = (nn.Parameter(torch.empty(STREAMS)) for _ in range(2))
        self.replace: Mixing | None = None

    def mixing(self, x):
        # A mixture of the identity and of two cyclic shifts: doubly stochastic whatever the weights.
        logits = self.route(torch.tanh(x.flatten(2)))
        weights = torch.softmax(torch.cat([logits, x.new_zeros(*x.shape[:2], 1)], -1), -1)
        eye = torch.eye(STREAMS)
        shifts = torch.stack([eye, eye.roll(1, 0), eye.roll(2, 0)])
        return torch.einsum("btk,kij->btij", weights, shifts)

    def forward(self, x):
        h = self.mixing(x)
        if self.replace is not None:
            h = self.replace(self.number, h)
        added = self.branch((self.read[:, None] * x).sum(2))
        return self.write[:, None] * added.unsqueeze(2) + torch.matmul(h, x)


class LocalStreams(nn.Module):
    """Blocks of three streams, their mean, a norm and a head."""

    def __init__(self, layers: int = 3, replace: Mixing | None = None):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.start = nn.Parameter(torch.empty(STREAMS, WIDTH))
        self.layers = nn.ModuleList(LocalBlock(number) for number in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        generator = torch.Generator().manual_seed(5)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        for layer in self.layers:
            layer.replace = replace

    def forward(self, ids):
        x = self.embed(ids).unsqueeze(2).repeat(1, 1, STREAMS, 1) * self.start
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x.mean(2)))


def ids(sequences: int = 4, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(0, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))
