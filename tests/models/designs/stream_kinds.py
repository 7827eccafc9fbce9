"""Stream connections of other forms: fractions, gates of features, several reads and writes, k of N streams."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from torch import nn
from torch.nn import functional

from tests.models.designs import truth
from tests.models.designs.design import Design
from tests.models.designs.mixing import Dynamic, Identity, Sinkhorn, sinkhorn
from tests.models.designs.parts import BLOCKS, STREAMS, VOCABULARY, WIDTH, Attention, Mlp

STREAMED = "b t n d -> b t n d"


class Streamed(nn.Module):
    """Embedding, copies, blocks, sum, head."""

    block: type[nn.Module]

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.offsets = nn.Parameter(torch.randn(STREAMS, WIDTH))
        self.blocks = nn.ModuleList(self.block(layer) for layer in range(BLOCKS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def begin(self, x):
        return x.unsqueeze(2) + self.offsets

    def forward(self, ids):
        x = self.begin(self.embed(ids))
        truth.state(x, -1, "embed", axes=STREAMED)
        for block in self.blocks:
            x = block(x)
        return self.head(x.sum(2))


class GatedBlock(nn.Module):
    """Reads by a gate a feature, writes by a gate a stream, and mixes nothing (qwen4_exp)."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.attn, self.mlp = Attention(norm=True), Mlp(norm=True)
        self.gates = nn.ModuleList(nn.Linear(STREAMS * WIDTH, STREAMS * WIDTH) for _ in range(2))
        self.inject = nn.ModuleList(nn.Linear(STREAMS * WIDTH, STREAMS) for _ in range(2))

    def forward(self, x):
        for number, (branch, site) in enumerate(((self.attn, "mid"), (self.mlp, "post"))):
            flat = x.flatten(2)
            gate = self.gates[number](flat).sigmoid().view_as(x)
            read = (gate * x).sum(2)
            added = branch(read)
            post = self.inject[number](flat)
            truth.connection(h_res=torch.eye(STREAMS), h_post=post, branch_in=read, branch_out=added)
            x = x + post.unsqueeze(-1) * added.unsqueeze(2)
            truth.state(x, self.layer, site, axes=STREAMED)
        return x


class Gated(Streamed):
    block = GatedBlock


class KOfNBlock(nn.Module):
    """Only two of the streams, other ones in each block, are mixed and written (xHC)."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer, self.chosen = layer, [layer % STREAMS, (layer + 2) % STREAMS]
        self.branch = (Attention, Mlp)[layer % 2](norm=True)
        self.logits = nn.Parameter(torch.randn(2, 2))
        self.pre, self.post = nn.Parameter(torch.rand(2)), nn.Parameter(torch.rand(2))

    def forward(self, x):
        some = x[:, :, self.chosen]
        mix = sinkhorn(self.logits)
        read = torch.einsum("i,btid->btd", self.pre, some)
        added = self.branch(read)
        some = torch.einsum("ij,btjd->btid", mix, some) + self.post[:, None] * added.unsqueeze(2)
        if truth.on():
            self.note(mix, read, added)
        x = x.index_copy(2, torch.tensor(self.chosen), some)
        truth.state(x, self.layer, axes=STREAMED)
        return x

    def note(self, mix, read, added) -> None:
        h_res, h_pre, h_post = torch.eye(STREAMS), torch.zeros(STREAMS), torch.zeros(STREAMS)
        h_res[[[i] for i in self.chosen], self.chosen] = mix.detach()
        h_pre[self.chosen], h_post[self.chosen] = self.pre.detach(), self.post.detach()
        truth.connection(h_res=h_res, h_pre=h_pre, h_post=h_post, branch_in=read, branch_out=added)


class KOfN(Streamed):
    block = KOfNBlock


class LoopConnection(nn.Module):
    """`prepare` gives what the branch reads, the mixed streams and the rest; calling it adds (x-transformers)."""

    def __init__(self, mix: type[nn.Module]):
        super().__init__()
        self.mix = mix()

    def prepare(self, residuals):
        x = rearrange(residuals, "(b n) t d -> b t n d", n=STREAMS)
        pre, post, res = self.mix.weights(x)
        read = torch.einsum("btn,btnd->btd", pre, x)
        return read, torch.einsum("btij,btjd->btid", res, x), {"beta": post, "alpha": (pre, res)}

    def forward(self, x, residual, *, beta, alpha):
        return rearrange(x.unsqueeze(2) * beta.unsqueeze(-1) + residual, "b t n d -> (b n) t d")


class ConnectionsInLoop(nn.Module):
    """No block modules: the model's loop opens a connection, calls a branch, and closes it."""

    mix: type[nn.Module] = Dynamic

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        kinds = [Attention, Mlp] * BLOCKS
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(WIDTH), kind(), LoopConnection(self.mix)]) for kind in kinds
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        x = repeat(self.embed(ids), "b t d -> (b n) t d", n=STREAMS)
        truth.state(x, -1, "embed", axes="(b n) t d -> b t n d", n=STREAMS)
        for number, (norm, branch, connection) in enumerate(self.layers):
            read, mixed, weights = connection.prepare(x)
            added = branch(norm(read))
            pre, res = weights["alpha"]
            truth.connection(h_res=res, h_pre=pre, h_post=weights["beta"], branch_in=read, branch_out=added)
            x = connection(added, mixed, **weights)
            truth.state(x, number, axes="(b n) t d -> b t n d", n=STREAMS)
        return self.head(x.view(-1, STREAMS, *x.shape[1:]).sum(1))


class ConstrainedInLoop(ConnectionsInLoop):
    mix = Sinkhorn


class IndependentBlock(nn.Module):
    """A module gives (write weights, collapsed): a pair, in which no matrix is (HY4)."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.attn, self.mlp = Attention(norm=True), Mlp(norm=True)
        self.attn_layer, self.mlp_layer = TwoWeights(), TwoWeights()

    def forward(self, x):
        for layer, branch, site in ((self.attn_layer, self.attn, "mid"), (self.mlp_layer, self.mlp, "post")):
            post, collapsed = layer(x)
            added = branch(collapsed)
            truth.connection(
                h_res=torch.eye(STREAMS), h_pre=layer.seen, h_post=post, branch_in=collapsed, branch_out=added
            )
            x = x + post.unsqueeze(-1) * added.unsqueeze(2)
            truth.state(x, self.layer, site, axes=STREAMED)
        return (x,)


class TwoWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = Identity()
        self.seen = torch.zeros(STREAMS)

    def forward(self, x):
        pre, post, _ = self.mix.weights(x)
        if truth.on():
            self.seen = pre.detach()
        return post, torch.einsum("btn,btnd->btd", pre, x)


class EmbeddingBetween(Streamed):
    """A per-layer embedding is added to all streams before each block (qwen4_exp's ple)."""

    block = IndependentBlock

    def __init__(self):
        super().__init__()
        self.per_layer = nn.ModuleList(nn.Embedding(VOCABULARY, WIDTH) for _ in range(BLOCKS))

    def forward(self, ids):
        x = self.begin(self.embed(ids))
        truth.state(x, -1, "embed", axes=STREAMED)
        for number, block in enumerate(self.blocks):
            x = x + self.per_layer[number](ids).unsqueeze(2)
            truth.state(x, number - 1, "pre|embed|post", axes=STREAMED, need=f"layer {number - 1}")
            (x,) = block(x)
        return self.head(functional.normalize(x.sum(2), dim=-1))


class ExpandedInside(nn.Module):
    """Streams are made and merged inside of each block: between the blocks there is one state of width D."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.branch = (Attention, Mlp)[layer % 2](norm=True)
        self.mix = Sinkhorn()

    def forward(self, x):
        streams = repeat(x, "b t d -> b t n d", n=STREAMS)
        pre, post, res = self.mix.weights(streams)
        added = self.branch((pre.unsqueeze(-1) * streams).sum(2))
        streams = res @ streams + post.unsqueeze(-1) * added.unsqueeze(2)
        x = streams.mean(2)
        truth.state(x, self.layer)
        return x


class NothingPersists(Streamed):
    block = ExpandedInside

    def forward(self, ids):
        x = self.embed(ids)
        truth.state(x, -1, "embed")
        for block in self.blocks:
            x = block(x)
        return self.head(x)


STREAMS_APART: dict[str, Any] = {"layout": "B T N D", "streams": STREAMS}
STREAM_KIND_DESIGNS = (
    Design(
        "gates a feature read, gates a stream write",
        Gated,
        family="gated",
        constraint="identity",
        **STREAMS_APART,
    ),
    Design("two of four streams", KOfN, family="mhc|hc", constraint="doubly stochastic", **STREAMS_APART),
    Design(
        "mHC in the model's loop",
        ConstrainedInLoop,
        family="mhc",
        constraint="doubly stochastic",
        layers="layers.{i}.1",
        layout="(B N) T D",
        streams=STREAMS,
    ),
    Design(
        "independent streams, embedding between",
        EmbeddingBetween,
        family="independent_hc|streams",
        constraint="identity",
        **STREAMS_APART,
    ),
    Design("streams that do not persist between blocks", NothingPersists, family="residual|unproven"),
)
