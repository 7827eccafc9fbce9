"""Streams that no family declares, mixed by plain functions, in every layout that one can think of."""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange, repeat
from torch import nn

from tests.models.designs import truth
from tests.models.designs.design import Design
from tests.models.designs.parts import BATCH, STREAMS, WIDTH


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x):
        return self.attend(x, x, x, need_weights=False)[0]


class Block(nn.Module):
    """Two branches of one stream's width; the streams are read, mixed and written by bare parameters."""

    def __init__(self, layer: int, held: str, *, inlined: bool = False, dynamic: bool = False):
        super().__init__()
        self.layer, self.held, self.inlined = layer, held, inlined
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, STREAMS * WIDTH), nn.Linear(STREAMS * WIDTH, WIDTH)
        self.mlp = None if inlined else nn.Sequential(self.up, nn.GELU(), self.down)
        # Bare parameters and no module that returns weights: no hook can see what mixes the streams.
        self.read = nn.Parameter(torch.rand(2, STREAMS))
        self.mix = nn.Parameter(torch.rand(2, STREAMS, STREAMS) / STREAMS)
        self.write = nn.Parameter(torch.rand(2, STREAMS))
        self.whole = nn.LayerNorm(STREAMS * WIDTH) if dynamic else None
        self.weights = nn.Linear(STREAMS * WIDTH, STREAMS) if dynamic else None

    def feed(self, x):
        # Inlined, no module call shows the branch's output.
        return self.down(nn.functional.gelu(self.up(x))) if self.inlined else self.mlp(x)

    def forward(self, state):
        x = opened(state, self.held)
        for number, branch in enumerate((self.attention, self.feed)):
            write = self.write[number][:, None]
            if self.whole is not None:
                write = write + self.weights(self.whole(x.flatten(-2)))[..., None]
            read = torch.einsum("n,btnd->btd", self.read[number], x)
            added = write * branch(self.norms[number](read))[:, :, None]
            x = torch.einsum("mn,btnd->btmd", self.mix[number], x) + added
            post = {"h_post": self.write[number]} if self.whole is None else {}
            truth.connection(h_res=self.mix[number], h_pre=self.read[number], **post)
            truth.state(x, self.layer, ("mid", "post")[number], axes="b t n d -> b t n d")
        return closed(x, self.held)


def opened(state, held: str):
    """Streams as (batch, token, stream, feature)."""
    if held in ("tuple", "list"):
        return torch.stack(list(state), 2)
    return rearrange(state, f"{held} -> b t n d", b=BATCH, n=STREAMS)


def closed(x, held: str):
    if held in ("tuple", "list"):
        return (tuple if held == "tuple" else list)(x.unbind(2))
    return rearrange(x, f"b t n d -> {held}")


class Unseen(nn.Module):
    """A language model with streams in any layout; ``apart`` starts them as different vectors, not as copies."""

    def __init__(self, held: str, *, apart: bool = False, **options):
        super().__init__()
        self.held = held
        self.embed = nn.Embedding(64, WIDTH)
        self.offsets = nn.Parameter(torch.randn(STREAMS, WIDTH)) if apart else None
        self.blocks = nn.ModuleList(Block(layer, held, **options) for layer in range(3))
        self.head = nn.Linear(WIDTH, 64)

    def forward(self, ids):
        x = repeat(self.embed(ids), "b t d -> b t n d", n=STREAMS)
        x = x if self.offsets is None else x + self.offsets
        truth.state(x, -1, "embed", axes="b t n d -> b t n d")
        state = closed(x, self.held)
        for block in self.blocks:
            state = block(state)
        return self.head(opened(state, self.held).mean(2))


HELD = ("b t (n d)", "b t (d n)", "b (n t) d", "b (t n) d", "(b n) t d", "(n b) t d", "n b t d", "b t n d", "b n t d",
        "t b n d", "b t d n", "n t b d", "t n b d", "b d n t", "tuple", "list")  # fmt: skip
OPTIONS = ("inlined", "dynamic", "apart")


def unseen(held: str, **options) -> Unseen:
    torch.manual_seed(0)
    return Unseen(held, **options).eval()


def _design(number: int, held: str) -> Design:
    """A layout with some of the options: all eight sets of them come twice."""
    options = [option for at, option in enumerate(OPTIONS) if (number + number // 8) >> at & 1]
    return Design(
        f"streams as {held}" + "".join(f", {option}" for option in options),
        partial(Unseen, held, **dict.fromkeys(options, True)),
        family="hc|mhc|unknown",
        streams=STREAMS,
        layers="blocks.{i}" if " " in held else "",
        layout=held.upper(),
    )


LAYOUT_DESIGNS = tuple(_design(number, held) for number, held in enumerate(HELD))
