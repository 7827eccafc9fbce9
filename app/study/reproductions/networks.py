"""Which small networks do the reproductions compare? One byte decoder, its connections and its norms exchanged."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from depthscope.app.study.reproductions.streams import DIAGONAL, MAPS, StreamConnection
from depthscope.app.study.small_lm import MLP, NUM_BYTES, Attention, LanguageOutput, Size, SmallLM, build

NORMS = ("no-skip", "post-ln", "pre-ln", "ln-scaling")
"""Where the norm is, and whether there is a skip."""


# Of a fresh head against variance 1/fan-in: the first loss is within 0.01 of ln 256.
HEAD_SCALE = 0.1


class ByteDecoder(nn.Module):
    """Embedding, a trunk that subclasses define, norm and head; bytes in, logits and a loss out.

    ``size``: depth, width, heads.
    """

    def __init__(self, size: Size):
        super().__init__()
        self.embedding = nn.Embedding(NUM_BYTES, size.width)
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, NUM_BYTES, bias=False)

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        """Carry the embedding (B, T, D) through all layers."""
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> LanguageOutput:
        """Predict each next byte.

        Returns: With a loss in nats per byte where there are labels.
        """
        logits = self.head(self.norm(self.trunk(self.embedding(input_ids))))
        if labels is None:
            return LanguageOutput(logits)
        return LanguageOutput(logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))

    def initialise(self, size: Size, *, depth_scaled: bool) -> None:
        """Normal weights of variance 1/fan-in; what writes to the stream divided by √(2L) where asked; a small head."""
        nn.init.normal_(self.embedding.weight)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes = depth_scaled and name.endswith((".out", ".down"))
                scale = 1 / math.sqrt(2 * size.layers) if writes else 1.0
                nn.init.normal_(module.weight, std=scale / math.sqrt(module.in_features))
        # Not zero: no gradient would reach a fresh network.
        nn.init.normal_(self.head.weight, std=HEAD_SCALE / math.sqrt(size.width))


class ScaledNorm(nn.LayerNorm):
    """A layer norm whose output is divided by √l in layer l: LayerNorm scaling (2502.05795)."""

    def __init__(self, width: int, layer: int):
        super().__init__(width)
        self.factor = 1 / math.sqrt(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise and scale."""
        return super().forward(x) * self.factor


class NormLayer(nn.Module):
    """Attention and an MLP with the norm before or after them, or no skip; `layer` counts from 1."""

    def __init__(self, norm: str, size: Size, layer: int):
        super().__init__()
        self.kind = norm
        self.attention, self.mlp = Attention(size), MLP(size)
        if norm == "post-ln":
            self.after_attention, self.after_mlp = self.attention.norm, self.mlp.norm
            self.attention.norm, self.mlp.norm = nn.Identity(), nn.Identity()
        elif norm == "ln-scaling":
            self.attention.norm, self.mlp.norm = (
                ScaledNorm(size.width, layer),
                ScaledNorm(size.width, layer),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Carry a state (B, T, D) through the layer."""
        if self.kind == "no-skip":
            return self.mlp(self.attention(x))
        if self.kind == "post-ln":
            x = self.after_attention(x + self.attention(x))
            return self.after_mlp(x + self.mlp(x))
        x = x + self.attention(x)
        return x + self.mlp(x)


class NormDecoder(ByteDecoder):
    """A plain decoder that differs in the place of its norms alone; all weights have variance 1/fan-in.

    ``norm``: one of `NORMS`.
    ``size``: depth, width, heads.
    """

    def __init__(self, norm: str, size: Size):
        super().__init__(size)
        self.blocks = nn.ModuleList(NormLayer(norm, size, layer + 1) for layer in range(size.layers))
        # GPT-2's 1/√(2L) would be a cure of its own.
        self.initialise(size, depth_scaled=False)

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        """Run the blocks one after the other."""
        for block in self.blocks:
            x = block(x)
        return x


class DepthQuery(nn.Module):
    """Attention residuals (2603.15031): what is read is a softmax mixture of all earlier outputs.

    Keys are the outputs, normalised; the query is a learned vector, zero at the start: a plain mean.
    """

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))
        self.norm = nn.RMSNorm(width, elementwise_affine=False)

    def forward(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Mix the embedding and the outputs so far."""
        stacked = torch.stack(values)
        weights = (self.norm(stacked) @ self.query).softmax(0)
        return (weights.unsqueeze(-1) * stacked).sum(0)


class DepthAttentionLM(ByteDecoder):
    """Every sublayer, and the head, reads a softmax mixture of the embedding and all earlier outputs.

    ``size``: depth, width, heads.
    """

    def __init__(self, size: Size):
        super().__init__(size)
        self.branches = nn.ModuleList(
            sublayer(size) for _ in range(size.layers) for sublayer in (Attention, MLP)
        )
        self.queries = nn.ModuleList(DepthQuery(size.width) for _ in range(2 * size.layers + 1))
        self.initialise(size, depth_scaled=False)

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        """Run the sublayers, each on what its query reads."""
        values = [x]
        for query, branch in zip(self.queries, self.branches, strict=False):
            values.append(branch(query(values)))
        return self.queries[-1](values)


class ScaledBranch(nn.Module):
    """A branch whose output is multiplied by a constant that is not trained."""

    def __init__(self, branch: nn.Module, scale: float):
        super().__init__()
        self.inner, self.scale = branch, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the branch and scale what it gives."""
        return self.scale * self.inner(x)


def scale_branches(model: nn.Module, scale: float) -> nn.Module:
    """Multiply the output of every branch of a network by a constant; the network is changed and returned."""
    if isinstance(model, DepthAttentionLM):
        model.branches = nn.ModuleList(ScaledBranch(branch, scale) for branch in model.branches)
        return model
    # The connections of SmallLM have their sublayer as `branch`; a network without any would keep its scale unnoticed.
    connections = [
        module for module in model.modules() if isinstance(getattr(module, "branch", None), nn.Module)
    ]
    assert connections, f"{type(model).__name__} has no connections"
    for connection in connections:
        connection.branch = ScaledBranch(connection.branch, scale)
    return model


def make(family: str, size: Size, seed: int, *, diagonal: float = DIAGONAL, broken: float = 0.0) -> nn.Module:
    """A fresh network of a family.

    ``family``: residual, hc, mhc (of the package), mhc-lite, kromhc, attention residuals, or one of `NORMS`.
    """
    if family in ("residual", "hc", "mhc"):
        return build(family, size=size, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family in MAPS:
            connection = partial(StreamConnection, mixing=family, diagonal=diagonal, broken=broken)
            return SmallLM(family, size, connection=connection)
        return DepthAttentionLM(size) if family == "attnres" else NormDecoder(family, size)
