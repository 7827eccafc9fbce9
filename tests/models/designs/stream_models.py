"""Models with streams: how they are expanded, mixed in one of the styles, and collapsed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from einops import repeat
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.models.designs import truth
from tests.models.designs.design import Design
from tests.models.designs.mixing import MIXES
from tests.models.designs.parts import BLOCKS, STREAMS, VOCABULARY, WIDTH, sized
from tests.models.designs.stream_styles import STYLES, closed, opened


class StreamModel(nn.Module):
    """A language model; names of mix, style, expansion and collapse are those of the tables here."""

    def __init__(self, mix: str, style: str, expand: str = "repeat", collapse: str = "sum"):
        super().__init__()
        self.style, self.expand, self.collapse = STYLES[style], expand, collapse
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(self.style(layer, MIXES[mix]) for layer in range(BLOCKS))
        self.offsets = nn.Parameter(torch.randn(STREAMS, WIDTH))
        self.widen = nn.Linear(WIDTH, STREAMS * WIDTH)
        self.read = nn.Linear(STREAMS * WIDTH, STREAMS)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        x = EXPANSIONS[self.expand](self, self.embed(ids))
        truth.state(x, -1, "embed", axes="b t n d -> b t n d")
        given = self.walk(opened(x, self.style))
        x = COLLAPSES[self.collapse](self, closed(given, self.style))
        return self.head(self.norm(x))

    def walk(self, given):
        for block in self.blocks:
            given = block(given)
        return given


EXPANSIONS = {
    "repeat": lambda model, x: repeat(x, "b t d -> b t n d", n=STREAMS),
    "expand": lambda model, x: x.unsqueeze(2).expand(-1, -1, STREAMS, -1),
    "offsets": lambda model, x: x.unsqueeze(2) + model.offsets,
    "projection": lambda model, x: model.widen(x).unflatten(-1, (STREAMS, WIDTH)),
    "first": lambda model, x: torch.cat([x[:, :, None], x.new_zeros(*x.shape[:2], STREAMS - 1, WIDTH)], 2),
}
COLLAPSES = {
    "sum": lambda model, x: x.sum(2),
    "mean": lambda model, x: x.mean(2),
    "head": lambda model, x: (functional.sigmoid(model.read(x.flatten(2)))[..., None] * x).sum(2),
    "first": lambda model, x: x[:, :, 0],
}
# Every style, and every mixing, once: with a free and a constrained mixing in turn, and in two styles in turn.
COMBINATIONS = (
    *((("dynamic HC", "mHC")[n % 2], style, "repeat", "sum") for n, style in enumerate(STYLES)),
    *(
        (
            mix,
            *(
                ("local variables of methods", "expand", "head"),
                ("weights returned by a module", "offsets", "mean"),
            )[n % 2],
        )
        for n, mix in enumerate(MIXES)
    ),
    *(("mHC", "streams first", expand, "first") for expand in ("projection", "first", "offsets")),
    *(
        ("static HC", "merged into features, inlined", expand, "mean")
        for expand in ("projection", "first", "offsets")
    ),
)


def _design(mix: str, style: str, expand: str, collapse: str) -> Design:
    ways = "" if (expand, collapse) == ("repeat", "sum") else f", {expand} to {collapse}"
    return Design(
        f"{mix}: {style}{ways}",
        partial(StreamModel, mix, style, expand, collapse),
        family=MIXES[mix].family,
        constraint=MIXES[mix].constraint,
        layout=STYLES[style].axes.split(" -> ")[0].upper(),
        streams=STREAMS,
    )


class SingleStreamBlock(StreamModel):
    """One block alone."""

    def __init__(self, *names: str):
        super().__init__(*names)
        self.blocks = self.blocks[:1]


class LoopedStreamBlock(SingleStreamBlock):
    """One block, called three times."""

    def walk(self, given):
        (block,) = self.blocks
        for turn in range(BLOCKS):
            block.layer = turn
            given = block(given)
        return given


class HalfStreams(StreamModel):
    """Weights and streams in bfloat16: the matrix that is applied is a rounded one."""

    def __init__(self, *names: str):
        super().__init__(*names)
        self.bfloat16()


class CheckpointedStreams(StreamModel):
    """Blocks under activation checkpointing."""

    def __init__(self, *names: str):
        super().__init__(*names)
        for block in self.blocks:
            inner = block.forward
            block.forward = partial(checkpoint, inner, use_reentrant=False)


# The axes have equal sizes, or size one, so that no size tells which axis is which.
SIZES = ((3, 4), (4, 4), (24, 4), (1, 11), (3, 1))
SIZED_STYLES = (
    "weights returned by a module", "local variables of methods", "streams first", "[s, b, n·D], weights returned",
    "merged into features, inlined",
)  # fmt: skip
# Other models of the same blocks.
WAYS = {
    "one block looped": LoopedStreamBlock,
    "one block only": SingleStreamBlock,
    "bfloat16": HalfStreams,
    "checkpointed": CheckpointedStreams,
}
WAY_STYLES = 2 * ("weights returned by a module", "local variables of methods")

STREAM_DESIGNS = (
    *(_design(*of) for of in COMBINATIONS),
    *(
        replace(
            _design("mHC", style, "offsets", "sum"),
            name=f"mHC: {style}, {batch} sequences of {length}",
            batch=sized(batch, length),
        )
        for style, (batch, length) in zip(SIZED_STYLES, SIZES, strict=True)
    ),
    *(
        replace(
            _design("dynamic HC", style, "repeat", "sum"),
            name=f"dynamic HC: {style}, {way}",
            make=partial(model, "dynamic HC", style),
            rounding=3e-2 if way == "bfloat16" else 1e-5,
        )
        for style, (way, model) in zip(WAY_STYLES, WAYS.items(), strict=True)
    ),
)
