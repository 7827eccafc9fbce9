"""What the designs are made of: sizes that no two axes share, branches, and batches."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

# All different, so that an axis that is taken for another one shows.
BATCH, TOKENS, WIDTH, STREAMS, BLOCKS, VOCABULARY = 3, 11, 24, 4, 3, 50


class Attention(nn.Module):
    """Causal attention with a norm of its own before it where ``norm`` is set."""

    def __init__(self, width: int = WIDTH, heads: int = 3, norm: bool = False, causal: bool = True):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else None
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x):
        if self.norm is not None:
            x = self.norm(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear maps, with a norm of its own before them where ``norm`` is set."""

    def __init__(self, width: int = WIDTH, norm: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else None
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        if self.norm is not None:
            x = self.norm(x)
        return self.down(functional.gelu(self.up(x)))


class Rms(nn.Module):
    """Root mean square norm with a learned gain."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def tokens(seed: int, batch: int = BATCH, length: int = TOKENS) -> torch.Tensor:
    """Sequences of tokens."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
