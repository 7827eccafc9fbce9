"""Networks that look like plain ones and are not, and plain ones that do not look like it."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional

from tests.models.designs import truth
from tests.models.designs.design import Design
from tests.models.designs.parts import BLOCKS, VOCABULARY, WIDTH, Attention, Mlp, normal, tokens
from tests.models.designs.plain_blocks import Decoder, PreNorm


class OneSublayer(nn.Module):
    """A block of one branch; what its state is, `step` says."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.branch = (Attention, Mlp)[layer % 2](norm=True)

    def forward(self, x):
        x = self.step(x)
        truth.state(x, self.layer)
        return x

    def step(self, x):
        truth.connection(residual_scale=1, branch_scale=1)
        return x + self.branch(x)


# --- not plain ---


class FromEmbeddingBlock(OneSublayer):
    def forward(self, x, first):
        x = first + self.branch(x)
        truth.state(x, self.layer)
        return x


class FromEmbedding(Decoder):
    """X' = X₀ + F(X): what is carried is the embedding, never the state."""

    block = FromEmbeddingBlock

    def walk(self, x):
        first = x
        for block in self.blocks:
            x = block(x, first)
        return x


class RolledBlock(OneSublayer):
    def step(self, x):
        return x.roll(1, dims=1) + self.branch(x)


class Rolled(Decoder):
    """The state of the token before is carried on."""

    block = RolledBlock


class HalfCarriedBlock(OneSublayer):
    def step(self, x):
        half = WIDTH // 2
        added = self.branch(x)
        return torch.cat([x[..., :half] + added[..., :half], added[..., half:]], -1)


class HalfCarried(Decoder):
    """Half of the features are carried on, the others are what the branch gives."""

    block = HalfCarriedBlock


class SelfProductBlock(OneSublayer):
    def step(self, x):
        truth.connection(residual_gate=torch.tanh(x), branch_scale=1)
        return x * torch.tanh(x) + self.branch(x)


class SelfProduct(Decoder):
    """The state is multiplied by a function of itself: a gate, as any other that is computed from the state."""

    block = SelfProductBlock


# --- plain in disguise ---


class EmbeddingReadBlock(OneSublayer):
    def forward(self, first, x):
        x = x + self.branch(first)
        truth.state(x, self.layer)
        return x


class EmbeddingRead(Decoder):
    """Every branch reads the embedding, the state only collects."""

    block = EmbeddingReadBlock

    def walk(self, x):
        first = x
        for block in self.blocks:
            x = block(first, x)
        return x


class SomeTokensBlock(OneSublayer):
    def step(self, x):
        chosen = x.norm(dim=-1).topk(5, -1).indices.unsqueeze(-1).expand(-1, -1, WIDTH)
        return x.scatter_add(1, chosen, self.branch(x.gather(1, chosen)))


class SomeTokens(Decoder):
    """Only some tokens go through a block, the others pass by (mixture of depths)."""

    block = SomeTokensBlock


class DeepPrompts(Decoder):
    """The first tokens are replaced by learned ones before every block (deep prompt tuning)."""

    def __init__(self):
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(BLOCKS, 2, WIDTH))

    def walk(self, x):
        for number, block in enumerate(self.blocks):
            x = torch.cat([self.prompts[number].expand(len(x), -1, -1), x[:, 2:]], 1)
            truth.state(x, number - 1, "pre|embed|post", need=f"layer {number - 1}")
            x = block(x)
        return x


class MergedTokens(Decoder):
    """Neighbouring tokens are averaged after every block: each block has half of the tokens."""

    def walk(self, x):
        for number, block in enumerate(self.blocks):
            x = block(x)
            x = functional.avg_pool1d(x.mT, 2).mT
            truth.state(x, number, "pre|post|embed", need=f"layer {number}")
        return x


class ByMethodBlock(PreNorm):
    def step(self, x):
        return self.run(x)

    def forward(self, x):
        raise NotImplementedError("the loop calls `step`")


class ByMethod(Decoder):
    """The blocks' forward is never called, but another method."""

    block = ByMethodBlock

    def walk(self, x):
        for block in self.blocks:
            x = block.step(x)
        return x


class NamedBlocks(Decoder):
    """Blocks by names without numbers."""

    def __init__(self):
        super().__init__()
        names = ("early", "middle", "late")
        self.blocks = nn.ModuleDict(OrderedDict(zip(names, self.blocks, strict=True)))

    def walk(self, x):
        for block in self.blocks.values():
            x = block(x)
        return x


class StackedWeights(Decoder):
    """One block, called with the weights of each layer out of stacked tensors."""

    def __init__(self):
        super().__init__(1)
        first = dict(self.blocks[0].named_parameters())
        self.stacked = nn.ParameterDict(
            {name.replace(".", "/"): torch.randn(BLOCKS, *p.shape) / WIDTH**0.5 for name, p in first.items()}
        )

    def walk(self, x):
        for number in range(BLOCKS):
            self.blocks[0].layer = number
            weights = {name.replace("/", "."): p[number] for name, p in self.stacked.items()}
            x = torch.func.functional_call(self.blocks[0], weights, (x,))
        return x


class Halves(Decoder):
    """Weights and states in bfloat16."""

    def __init__(self):
        super().__init__()
        self.bfloat16()


class Autocast(Decoder):
    """Autocast inside of the model."""

    def walk(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().walk(x)


class CrossBlock(nn.Module):
    """Self-attention, attention to a memory, MLP; the memory comes first."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.self_attn, self.mlp = Attention(norm=True), Mlp(norm=True)
        self.cross = nn.MultiheadAttention(WIDTH, 3, batch_first=True)

    def forward(self, memory, x):
        x = x + self.self_attn(x)
        truth.state(x, self.layer, "mid", chain="decoder")
        x = x + self.cross(x, memory, memory, need_weights=False)[0]
        truth.state(x, self.layer, "mid", chain="decoder")
        x = x + self.mlp(x)
        truth.state(x, self.layer, chain="decoder")
        return x


class EncoderBlock(PreNorm):
    def forward(self, x):
        return self.run(x, chain="encoder")


class EncoderDecoder(nn.Module):
    """An encoder whose last state goes first into every block of the decoder."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.ModuleList(EncoderBlock(layer) for layer in range(BLOCKS))
        self.decoder = nn.ModuleList(CrossBlock(layer) for layer in range(BLOCKS + 1))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source, target):
        memory = self.embed(source)
        truth.state(memory, -1, "embed", chain="encoder")
        for block in self.encoder:
            memory = block(memory)
        x = self.embed(target)
        truth.state(x, -1, "embed", chain="decoder")
        for block in self.decoder:
            x = block(memory, x)
        return self.head(x)


def source_and_target(seed: int):
    return tokens(seed), tokens(seed + 1, length=7)


class VectorNetwork(nn.Module):
    """A residual network on vectors, without tokens (RealMLP, ResMLP on tables)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(10, WIDTH)
        self.blocks = nn.ModuleList(Mlp(norm=True) for _ in range(4))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        x = self.stem(x)
        truth.state(x, -1, "embed", axes="b d -> b 1 1 d")
        for number, block in enumerate(self.blocks):
            x = x + block(x)
            truth.state(x, number, axes="b d -> b 1 1 d")
        return self.head(x)


def pairs(seed: int):
    return normal(seed, 8, 10)


TRAP_DESIGNS = (
    Design("the embedding is carried, not the state", FromEmbedding, family="depth_history"),
    Design("the state is rolled over tokens", Rolled, family=""),
    Design("half of the features are carried", HalfCarried, family=""),
    Design("the state times a function of itself", SelfProduct, family="highway"),
    Design("branches read the embedding", EmbeddingRead, family="residual|depth_attention|depth_history"),
    Design("mixture of depths", SomeTokens),
    Design("tokens replaced between blocks", DeepPrompts),
    Design("tokens merged between blocks", MergedTokens),
    Design("blocks called by another method", ByMethod),
    Design("blocks by names", NamedBlocks, layers=("blocks.early", "blocks.middle", "blocks.late")),
    Design("weights of all blocks stacked", StackedWeights, layers="blocks.0"),
    Design("bfloat16", Halves, rounding=1e-2),
    Design("autocast inside", Autocast),
    Design(
        "encoder and decoder, memory first",
        EncoderDecoder,
        source_and_target,
        layers=("encoder.{i}", "decoder.{i}"),
    ),
    Design("vectors without tokens, adds in the loop", VectorNetwork, pairs, layout="B D"),
)
