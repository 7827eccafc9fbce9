"""On which models is the capture measured? A GPT-2, an mHC decoder, and many tiny blocks for the cost of one hook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

VOCABULARY = 8192


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and of its batch; ``streams`` does not apply to the residual model."""

    layers: int
    width: int
    batch: int
    tokens: int
    heads: int = 8
    streams: int = 4


@dataclass(frozen=True)
class Case:
    """A model, and the modules whose outputs are its residual states, the embedding's first."""

    name: str
    model: nn.Module
    sites: tuple[str, ...]
    sizes: Sizes
    streams: int = 1

    def batch(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """Token numbers, which are also the labels."""
        shape = (self.sizes.batch, self.sizes.tokens)
        ids = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids, "labels": ids}

    def canonical(self, state: torch.Tensor) -> torch.Tensor:
        """A state as (batch, token, stream, feature)."""
        if self.streams == 1:
            return state.unsqueeze(2)
        return state.unflatten(0, (-1, self.streams)).transpose(1, 2)


def gpt2(sizes: Sizes) -> Case:
    """transformers' GPT-2; 12 × 768 has 92 million parameters here."""
    import transformers

    # No dropout: tools that run their own forward must give the same states. A small vocabulary, so that the blocks and
    # not the head are what is timed.
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=sizes.width,
        n_layer=sizes.layers,
        n_head=sizes.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    # The dropout after the embeddings is where the first residual state is; blocks return the later ones.
    sites = ("transformer.drop", *(f"transformer.h.{i}" for i in range(sizes.layers)))
    return Case("residual", transformers.GPT2LMHeadModel(config), sites, sizes)


class Attention(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.heads = sizes.heads
        self.norm = nn.LayerNorm(sizes.width)
        self.read = nn.Linear(sizes.width, 3 * sizes.width)
        self.write = nn.Linear(sizes.width, sizes.width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        parts = self.read(self.norm(x_BTD)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        return self.write(mixed.transpose(1, 2).flatten(2))


class Expand(nn.Module):
    """A module around the package's function, so that hooks see the first state."""

    def __init__(self, expand: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.expand = expand

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.expand(x)


class StreamDecoder(nn.Module):
    """A decoder on lucidrains' mHC: attention and feed-forward branches, a connection around each."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        from hyper_connections import mHC

        width = sizes.width
        connect, expand, self.reduce = mHC.get_init_and_expand_reduce_stream_functions(
            sizes.streams, dim=width
        )
        self.embed = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(sizes.tokens, width)
        self.expand = Expand(expand)
        branches = [part for _ in range(sizes.layers) for part in (Attention(sizes), feedforward(width))]
        # Two connections a layer, around attention and around the feed-forward branch.
        self.blocks = nn.ModuleList(connect(branch=branch) for branch in branches)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = self.expand(self.embed(input_ids) + self.position.weight[: input_ids.shape[1]])
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(self.reduce(x)))
        if labels is None:
            return {"logits": logits}
        # Each position predicts the next token, as transformers shifts labels.
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def feedforward(width: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
    )


def mhc(sizes: Sizes) -> Case:
    """Twice as many connections as layers, as in the mHC paper."""
    model = StreamDecoder(sizes)
    for name, parameter in model.named_parameters():
        if any(word in name for word in ("alpha", "beta")):
            # A fresh connection is symmetric: nothing would show which of its axes is the destination.
            nn.init.normal_(parameter, std=0.5)
    sites = ("expand", *(f"blocks.{i}" for i in range(2 * sizes.layers)))
    return Case(f"mHC, n = {sizes.streams}", model, sites, sizes, sizes.streams)


def tiny(_: Sizes) -> Case:
    """48 blocks that cost next to nothing, so that most of the difference from plain is the cost of hooks."""
    # 8 tokens of 32 features: a block takes microseconds of arithmetic.
    case = gpt2(Sizes(layers=48, width=32, batch=1, tokens=8, heads=4))
    return replace(case, name="48 tiny blocks")


CASES: dict[str, Callable[[Sizes], Case]] = {"residual": gpt2, "mhc": mhc, "tiny": tiny}


def build(name: str, sizes: Sizes) -> Case:
    """The same weights at every call."""
    # Weights are drawn at construction: tools and references must have the same model.
    torch.manual_seed(0)
    return CASES[name](sizes)


def run(case: Case, batch: dict[str, torch.Tensor], *, backward: bool, **options: Any) -> Any:
    """One forward, and one backward where asked, as a user writes them."""
    with torch.set_grad_enabled(backward):
        output = case.model(**batch, **options)
    if backward:
        output["loss"].backward()
    return output
