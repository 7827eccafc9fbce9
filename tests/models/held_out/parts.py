"""Branches and makers that the networks share; the residual wiring is each network's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tests.models.held_out import note
from tests.models.held_out.register import WIDTH

norm, rms = partial(nn.LayerNorm, WIDTH), partial(nn.RMSNorm, WIDTH)
attend = partial(functional.scaled_dot_product_attention, is_causal=True)


def lin(width: int) -> Callable[[], nn.Linear]:
    return partial(nn.Linear, WIDTH, width)


def stack(make: Callable[..., nn.Module], count: int, *given: Any) -> Callable[[], nn.ModuleList]:
    return lambda: nn.ModuleList(make(*given) for _ in range(count))


def param(*shape: int, law: Callable[..., torch.Tensor] = torch.rand) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(law(*shape))


def small(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) / 4


def built(**parts: Callable[[], Any]) -> type[nn.Module]:
    """A class to derive from, whose objects have these parts."""

    class Built(nn.Module):
        def __init__(self):
            super().__init__()
            for name, make in parts.items():
                setattr(self, name, make())

    return Built


class Attn(nn.Module):
    """Self-attention of two heads, or across to ``memory``; with a norm in front where asked."""

    def __init__(self, *, pre: bool = True, causal: bool = True):
        super().__init__()
        self.norm, self.causal = norm() if pre else nn.Identity(), causal
        self.q, self.kv, self.o = lin(WIDTH)(), lin(2 * WIDTH)(), lin(WIDTH)()

    def forward(self, x, memory=None):
        x = self.norm(x)
        k, v = self.kv(x if memory is None else memory).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2) for y in (self.q(x), k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal and memory is None)
        return self.o(out.transpose(1, 2).flatten(-2))


class Ffn(nn.Sequential):
    def __init__(self, *, pre: bool = True):
        first = norm() if pre else nn.Identity()
        super().__init__(first, nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class PreNorm(built(attn=Attn, ffn=Ffn)):
    def forward(self, x):
        x = x + self.attn(x)
        return x + self.ffn(x)


def sublayers(blocks: int = 3) -> nn.ModuleList:
    return nn.ModuleList(part for _ in range(blocks) for part in (Attn(), Ffn()))


def noted(x, blocks, axes: str = "b t d", chain: str = ""):
    """A plain loop over blocks; each state is noted."""
    note.state(x, axes, chain=chain)
    for block in blocks:
        x = block(x)
        note.state(x, axes, chain=chain)
    return x
