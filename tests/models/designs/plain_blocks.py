"""Plain residual networks whose blocks are modules, called in every way in which public code calls them."""

from __future__ import annotations

import torch
from torch import nn

from tests.models.designs import truth
from tests.models.designs.design import Design
from tests.models.designs.parts import (
    BLOCKS,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Attention,
    Mlp,
    Rms,
    normal,
    sized,
    tokens,
)


class PreNorm(nn.Module):
    """x + F(norm(x)), twice; the other blocks here change how it is called, not what it computes."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Attention(), Mlp()

    def run(self, x, chain: str = ""):
        for branch, norm, site in ((self.attn, self.norm1, "mid"), (self.mlp, self.norm2, "post")):
            added = branch(norm(x))
            truth.connection(residual_scale=1, branch_scale=1, branch_out=added, chain=chain)
            x = x + added
            truth.state(x, self.layer, site, chain=chain)
        return x

    def forward(self, x):
        return self.run(x)


class Decoder(nn.Module):
    """Embedding, blocks, norm, head; ``walk`` is how the state goes through the blocks."""

    block: type[nn.Module] = PreNorm

    def __init__(self, blocks: int = BLOCKS):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(self.block(layer) for layer in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def walk(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, ids):
        x = self.embed(ids)
        truth.state(x, -1, "embed")
        return self.head(self.norm(self.walk(x)))


def single() -> nn.Module:
    return Decoder(1)


# --- what blocks give ---


class WeightsFirst(PreNorm):
    def forward(self, x):
        y = self.run(x)
        return torch.softmax(y, -1), y


class SecondDecoder(Decoder):
    """Blocks give a tensor of the state's shape before the state itself."""

    block = WeightsFirst

    def walk(self, x):
        for block in self.blocks:
            _, x = block(x)
        return x


# --- how blocks take it ---


class Second(PreNorm):
    def forward(self, rotary, x, mask=None):
        return self.run(x)


class SecondArgumentDecoder(Decoder):
    """A tensor of the state's shape comes before the state, the same for every block."""

    block = Second

    def walk(self, x):
        rotary = torch.cos(x.detach())
        for block in self.blocks:
            x = block(rotary, x, mask=None)
        return x


class Holder(PreNorm):
    def forward(self, carried):
        carried["hidden"] = self.run(carried["hidden"])
        carried["calls"] += 1


class CarriedDict(Decoder):
    """One dict goes through all blocks, which write into it and give nothing."""

    block = Holder

    def walk(self, x):
        carried = {"hidden": x, "calls": 0}
        for block in self.blocks:
            block(carried)
        return carried["hidden"]


# --- how blocks are put together ---


class Universal(Decoder):
    """One block in a loop (arXiv 1807.03819)."""

    def __init__(self):
        super().__init__(1)

    def walk(self, x):
        for turn in range(BLOCKS):
            self.blocks[0].layer = turn
            x = self.blocks[0](x)
        return x


class Appended(Decoder):
    """A trained trunk of one class, and blocks of another class behind it in an attribute of their own."""

    def __init__(self):
        super().__init__()
        self.extra = nn.ModuleList(Grown(BLOCKS + number) for number in range(2))

    def walk(self, x):
        x = super().walk(x)
        for block in self.extra:
            x = block(x)
        return x


class Grown(PreNorm):
    """Of a class of its own, with another norm."""

    def __init__(self, layer: int):
        super().__init__(layer)
        self.norm1, self.norm2 = Rms(), Rms()


class LayerDrop(Decoder):
    """A block is left out at random (arXiv 1909.11556); the ones that ran have their own numbers."""

    def __init__(self):
        super().__init__(5)

    def walk(self, x):
        for block in self.blocks:
            if self.training and torch.rand(()) < 0.4:
                continue
            x = block(x)
        return x


class ParallelBlock(PreNorm):
    def forward(self, x):
        read = self.norm1(x)
        added = self.attn(read) + self.mlp(read)
        truth.connection(residual_scale=1, branch_scale=1)
        x = x + added
        truth.state(x, self.layer)
        return x


class Parallel(Decoder):
    """Attention and MLP read one norm and are added together (GPT-J, PaLM)."""

    block = ParallelBlock


class PostNormBlock(PreNorm):
    def forward(self, x):
        for branch, norm, site in ((self.attn, self.norm1, "mid"), (self.mlp, self.norm2, "post")):
            x = norm(x + branch(x))
            truth.state(x, self.layer, site)
        return x


class PostNorm(Decoder):
    """A norm of the sum is the state (Vaswani et al. 2017)."""

    block = PostNormBlock


class SandwichBlock(PreNorm):
    def __init__(self, layer: int):
        super().__init__(layer)
        self.after1, self.after2 = Rms(), Rms()

    def forward(self, x):
        rows = (
            (self.attn, self.norm1, self.after1, "mid"),
            (self.mlp, self.norm2, self.after2, "post"),
        )
        for branch, norm, after, site in rows:
            added = after(branch(norm(x)))
            truth.connection(residual_scale=1, branch_scale=1)
            x = x + added
            truth.state(x, self.layer, site)
        return x


class Sandwich(Decoder):
    """A norm before and one after every branch (Gemma 2)."""

    block = SandwichBlock


class FeedForward(nn.Module):
    """Norm, linear map, activation: as large as a block, and nothing is added to anything."""

    def __init__(self, layer: int):
        super().__init__()
        self.norm, self.map = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layer = layer

    def forward(self, x):
        x = torch.tanh(self.map(self.norm(x)))
        truth.state(x, self.layer)
        return x


class WithoutResidual(Decoder):
    """A feed-forward chain: no state is carried, so that no reading of it as a residual network is right."""

    block = FeedForward


class TokensFirstBlock(PreNorm):
    def forward(self, x):
        for branch, norm, site in ((self.attn, self.norm1, "mid"), (self.mlp, self.norm2, "post")):
            added = branch(norm(x).transpose(0, 1)).transpose(0, 1)
            truth.connection(residual_scale=1, branch_scale=1)
            x = x + added
            truth.state(x, self.layer, site, axes="t b d -> b t 1 d")
        return x


class TokensFirst(nn.Module):
    """Tokens before sequences inside, as in fairseq, fsmt and xlnet; the ids come sequences first."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(TokensFirstBlock(layer) for layer in range(BLOCKS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        x = self.embed(ids).transpose(0, 1).contiguous()
        truth.state(x, -1, "embed", axes="t b d -> b t 1 d")
        for layer in self.layers:
            x = layer(x)
        return self.head(x.transpose(0, 1))


class PackedSequences(nn.Module):
    """Sequences of several lengths behind each other in one axis, with their ends in ``cu_seqlens``."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(PackedBlock(layer) for layer in range(BLOCKS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, cu_seqlens):
        x = self.embed(ids)
        truth.state(x, -1, "embed", axes="t d -> 1 t 1 d")
        for layer in self.layers:
            x = layer(x, cu_seqlens)
        return self.head(x)


class PackedBlock(PreNorm):
    def forward(self, x, ends):
        read = self.norm1(x)
        added = torch.cat([self.attn(part[None])[0] for part in read.split(ends.diff().tolist())])
        truth.connection(residual_scale=1, branch_scale=1)
        x = x + added
        truth.state(x, self.layer, "mid", axes="t d -> 1 t 1 d")
        added = self.mlp(self.norm2(x))
        truth.connection(residual_scale=1, branch_scale=1)
        x = x + added
        truth.state(x, self.layer, axes="t d -> 1 t 1 d")
        return x


def packed_batch(seed: int):
    return tokens(seed, 1, 3 * TOKENS)[0], torch.tensor([0, 7, 19, 3 * TOKENS])


class Continuous(Decoder):
    """The batch is already a sequence of vectors: the first state is the model's own input."""

    def forward(self, x):
        truth.state(x, -1, "embed")
        return self.head(self.norm(self.walk(x)))


def vectors(seed: int) -> torch.Tensor:
    return normal(seed, 3, TOKENS, WIDTH)


BLOCK_DESIGNS = (
    Design("pre-norm, one sequence", Decoder, sized(1, TOKENS)),
    Design("pre-norm, as many sequences as tokens", Decoder, sized(TOKENS, TOKENS)),
    Design("pre-norm, tensor in and out", Decoder),
    Design("pre-norm, on vectors", Continuous, vectors),
    Design("one block only", single),
    Design("blocks give weights of the state's shape, then the state", SecondDecoder),
    Design("blocks take the state second", SecondArgumentDecoder),
    Design("a dict is carried and written into", CarriedDict),
    Design("universal transformer", Universal),
    Design("blocks of another class appended", Appended, layers=("blocks.{i}", "extra.{i}")),
    Design("LayerDrop in training", LayerDrop, training=True),
    Design("parallel attention and MLP", Parallel),
    Design("post-norm", PostNorm),
    Design("sandwich norm", Sandwich),
    Design("feed-forward chain", WithoutResidual, family=""),
    Design("tokens first inside", TokensFirst, layers="layers.{i}", layout="T B D"),
    Design("packed sequences", PackedSequences, packed_batch, layers="layers.{i}", layout="T D"),
)
