"""Three shapes of public code that were once read wrongly and called proven, left out without a word, or beyond any override."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import depthscope as ds

WIDTH = 16


def mlp(norm: bool = True) -> nn.Sequential:
    layers = nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
    return nn.Sequential(*([nn.RMSNorm(WIDTH)] if norm else []), *layers)


class Lanes(nn.Module):
    """Two lanes side by side, to each of which the embedding is added again before every block; their sum is read at the end."""

    def __init__(self, lanes: int = 2, depth: int = 4):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(nn.ModuleList(mlp() for _ in range(lanes)) for _ in range(depth))
        self.keep = nn.Parameter(torch.rand(depth, lanes) + 0.5)
        self.again = nn.Parameter(torch.rand(depth, lanes))

    def forward(self, x):
        first = self.embed(x)
        lanes = [first] * len(self.layers[0])
        for layer, keep, again in zip(self.layers, self.keep, self.again, strict=True):
            lanes = [k * lane + a * first for lane, k, a in zip(lanes, keep, again, strict=True)]
            lanes = [lane + branch(lane) for lane, branch in zip(lanes, layer, strict=True)]
        return self.head(sum(lanes))


class Block(nn.Module):
    """A block with a residual of its own."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = mlp(), mlp()

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


class Looped(nn.Module):
    """One block with most of the weights in a loop, whose output is added to what the loop carries."""

    def __init__(self, loops: int = 4):
        super().__init__()
        torch.manual_seed(0)
        self.loops, self.keep, self.again = loops, nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))
        self.embed, self.head, self.block = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3), Block()
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, x):
        first = state = self.embed(x)
        for _ in range(self.loops):
            made = self.block(self.norm(state + first))
            state = self.keep * state + self.again * first + made
        return self.head(state)


class ValueResidual(nn.Module):
    """Attention whose values are mixed with those of the first layer by a gate of each token and head."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mix = nn.Sequential(nn.Linear(WIDTH, 2), nn.Sigmoid())

    def forward(self, x, first):
        y = self.norm(x)
        q, k, v = self.qkv(y).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        if first is None:
            first = v
        else:
            v = v.lerp(first, self.mix(y).transpose(1, 2)[..., None])
        given = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(given.transpose(1, 2).flatten(2)), first


class Values(nn.Module):
    """A transformer whose attention values have a residual of their own."""

    def __init__(self, depth: int = 4):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(nn.ModuleList([ValueResidual(), mlp()]) for _ in range(depth))

    def forward(self, x):
        x, first = self.embed(x), None
        for attention, feedforward in self.layers:
            given, first = attention(x, first)
            x = x + given
            x = x + feedforward(x)
        return self.head(x)
