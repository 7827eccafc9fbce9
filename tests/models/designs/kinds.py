"""Kinds of networks that were once read otherwise than they are, where a rule of choice was taken away."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tests.models.designs import truth
from tests.models.designs.design import Design
from tests.models.designs.parts import BLOCKS, WIDTH, Attention, Mlp
from tests.models.designs.plain_blocks import Decoder, PreNorm

STREAMS = 3


class Activated(PreNorm):
    """x + F(activation(x)): the block begins with an activation, which its branches alone read."""

    def forward(self, x):
        for branch, site in ((self.attn, "mid"), (self.mlp, "post")):
            added = branch(functional.gelu(x))
            truth.connection(residual_scale=1, branch_scale=1, branch_out=added)
            x = x + added
            truth.state(x, self.layer, site)
        return x


class BeginsWithActivations(Decoder):
    block = Activated


class Sublayer(nn.Module):
    """A norm, what it is for, and the sum, as T5's layers have them."""

    def __init__(self, layer: int, inner: nn.Module, site: str):
        super().__init__()
        self.layer, self.site = layer, site
        self.layer_norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x):
        added = self.inner(self.layer_norm(x))
        truth.connection(residual_scale=1, branch_scale=1, branch_out=added)
        x = x + added
        truth.state(x, self.layer, self.site)
        return x


class SublayerBlock(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        self.layer = nn.ModuleList([Sublayer(layer, Attention(), "mid|post"), Sublayer(layer, Mlp(), "post")])

    def forward(self, x):
        return self.layer[1](self.layer[0](x))


class OfSublayers(Decoder):
    """Blocks of sublayers that hand every state on."""

    block = SublayerBlock


class TurnedTokens(Decoder):
    """The tokens are put into the opposite order between the second block and the third."""

    def walk(self, x):
        for number, block in enumerate(self.blocks):
            if number == 2:
                x = x.flip(1)
                truth.state(x, number, "pre", need="")
            x = block(x)
        return x


class ListedStreams(nn.Module):
    """Streams as tensors in a list, which begin in several ways, and of which the head takes one or all."""

    def __init__(self, start: str, head: str):
        super().__init__()
        self.start, self.taken = start, head
        self.embed, self.norm, self.head = nn.Embedding(50, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 50)
        self.begin = nn.Parameter(torch.randn(STREAMS, WIDTH))
        self.project = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(STREAMS))
        self.branches = nn.ModuleList(Mlp(norm=True) for _ in range(BLOCKS))
        self.mix = nn.Parameter(torch.eye(STREAMS) + 0.2 * torch.randn(BLOCKS, STREAMS, STREAMS))
        self.read, self.write = (nn.Parameter(torch.rand(BLOCKS, STREAMS) + 0.2) for _ in range(2))

    def first(self, x):
        if self.start == "projections":
            return [project(x) for project in self.project]
        zeros = self.start == "zeros"
        return [x, *(torch.zeros_like(x) if zeros else self.begin[n].expand_as(x) for n in range(1, STREAMS))]

    def forward(self, ids):
        streams = self.first(self.embed(ids))
        truth.state(torch.stack(streams, 2), -1, "embed", axes="b t n d -> b t n d")
        for layer, branch in enumerate(self.branches):
            mix, read, write = self.mix[layer], self.read[layer], self.write[layer]
            added = branch(sum(weight * stream for weight, stream in zip(read, streams, strict=True)))
            truth.connection(h_res=mix, h_pre=read, h_post=write, branch_out=added)
            streams = [
                sum(weight * stream for weight, stream in zip(row, streams, strict=True)) + own * added
                for row, own in zip(mix, write, strict=True)
            ]
            truth.state(torch.stack(streams, 2), layer, axes="b t n d -> b t n d")
        return self.head(self.norm(streams[0] if self.taken == "one" else sum(streams)))


class Closure(nn.Module):
    """A branch wrapped in a module that adds, as public packages of hyper-connections return them for n = 1."""

    def __init__(self, layer: int, branch: nn.Module, site: str):
        super().__init__()
        self.layer, self.site, self.branch = layer, site, branch

    def forward(self, x):
        added, add = self.branch(x), self.connected(x)
        return add(added)

    def connected(self, x):
        def add(added):
            truth.connection(residual_scale=1, branch_scale=1, branch_out=added)
            y = x + added
            truth.state(y, self.layer, self.site)
            return y

        return add


class Closures(Decoder):
    """Lists of two such modules each are the blocks; nothing is called with a number of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList([Closure(n, Attention(norm=True), "mid"), Closure(n, Mlp(norm=True), "post")])
            for n in range(BLOCKS)
        )

    def walk(self, x):
        for attention, mlp in self.blocks:
            x = mlp(attention(x))
        return x


LISTED = {"family": "hc", "layers": "", "streams": STREAMS, "layout": "N B T D"}
KIND_DESIGNS = (
    Design("blocks that begin with activations", BeginsWithActivations),
    Design("blocks of sublayers that hand states on", OfSublayers, labelled=False),
    Design("tokens turned between blocks", TurnedTokens),
    Design("closures that add, in lists", Closures, layers=""),
    *(
        Design(f"a list of streams, from {start}, head takes {head}", partial(ListedStreams, start, head), **LISTED)
        for start, head in (("zeros", "all"), ("parameters", "all"), ("projections", "all"), ("zeros", "one"))
    ),
)  # fmt: skip
