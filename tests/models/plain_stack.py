"""The plain network of many tests: blocks one after another, x + F(x) where nothing else is said."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class Block(nn.Module):
    """x + F(x)."""

    def __init__(self, width: int, net: nn.Module | None = None):
        super().__init__()
        self.net = net or nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh())

    def forward(self, x):
        return x + self.net(x)


class Stack(nn.Module):
    """Blocks, from an embedding and to a head where there are any."""

    def __init__(
        self, blocks: Iterable[nn.Module], embed: nn.Module | None = None, head: nn.Module | None = None
    ):
        super().__init__()
        self.embed, self.blocks, self.head = embed, nn.ModuleList(blocks), head

    def forward(self, x):
        x = x if self.embed is None else self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x if self.head is None else self.head(x)
