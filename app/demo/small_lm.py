"""What do the demo's small language models look like? One decoder, three connections."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from hyper_connections import (
    HyperConnections,
    ManifoldConstrainedHyperConnections,
    Residual,
    get_expand_reduce_stream_functions,
)
from torch import nn

from depthscope.app.demo import TITLES
from depthscope.diagnostics.errors import InputError

# Shapes: B sequences, T tokens, D features, H heads, V vocabulary, N streams.

# Bytes need no tokenizer: the demo trains without any download.
NUM_BYTES = 256
NUM_STREAMS = 4
# Of the paper on rotary embeddings (Su et al. 2021).
ROPE_BASE = 10_000.0
CONNECTIONS = tuple(TITLES)


@dataclass(frozen=True)
class Size:
    """How large each of the three models is."""

    layers: int = 8
    width: int = 64
    heads: int = 4
    streams: int = NUM_STREAMS


@dataclass
class LanguageOutput:
    """What the model returns; the loss is there when labels are given."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Attention(nn.Module):
    """Pre-norm causal self-attention with rotary positions; the branch of a connection."""

    def __init__(self, size: Size):
        super().__init__()
        self.heads = size.heads
        self.norm = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Mix tokens.

        ``x_BTD``: input of the branch, which the connection reads from the streams.
        """
        B, T, D = x_BTD.shape
        qkv = self.qkv(self.norm(x_BTD)).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # Without a mask of padding: padding is on the right, where a causal token does not look.
        mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Pre-norm two-layer perceptron; the branch of a connection."""

    def __init__(self, size: Size):
        super().__init__()
        self.norm = nn.LayerNorm(size.width)
        self.up = nn.Linear(size.width, 4 * size.width, bias=False)
        self.down = nn.Linear(4 * size.width, size.width, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Transform each token.

        ``x_BTD``: input of the branch, which the connection reads from the streams.
        """
        return self.down(F.gelu(self.up(self.norm(x_BTD))))


def rotated(x_BHTd: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding: each pair of features turns with the position.

    ``x_BHTd``: queries or keys; the last dim is even.
    """
    T, d = x_BHTd.shape[-2:]
    # Pairs are (i, i + d/2), GPT-NeoX's order, so that one chunk splits them.
    rates = ROPE_BASE ** -(torch.arange(0, d, 2, device=x_BHTd.device) / d)
    angles = torch.outer(torch.arange(T, device=x_BHTd.device), rates)
    first, second = x_BHTd.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Block(nn.Module):
    """One layer: attention, then an MLP, each inside a connection of its own."""

    def __init__(self, connection: Callable[..., nn.Module], layer: int, size: Size):
        super().__init__()
        self.attn = connection(branch=Attention(size), layer_index=2 * layer)
        self.mlp = connection(branch=MLP(size), layer_index=2 * layer + 1)

    def forward(self, streams: torch.Tensor) -> torch.Tensor:
        """Carry the residual streams through one layer.

        ``streams``: (B·N, T, D), the streams of a sequence next to each other.
        """
        return self.mlp(self.attn(streams))


class SmallLM(nn.Module):
    """Byte-level decoder whose sublayers are joined by the given kind of connection.

    Embeddings have unit variance, matrices that write to the stream are scaled by 1/√(2L) (GPT-2's rule), the
    head starts at zero: every run starts at the loss ln V. The connections start as the package has them:
    the streams are copies; HC then computes the very function of the residual model, while mHC mixes strongly
    (the diagonal of H_res is 0.475, its second eigenvalue 0.3) and has to break the symmetry of its streams.

    ``kind``: which connection of the hyper-connections package.
    ``size``: depth, width, heads, streams.
    ``connection``: in place of the package's: takes the number of streams, ``dim``, ``branch`` and ``layer_index``.
    """

    def __init__(self, kind: str, size: Size = Size(), *, connection: Callable[..., nn.Module] | None = None):
        super().__init__()
        self.kind = kind
        streams = 1 if kind == "residual" else size.streams
        connection = partial(connection or connection_class(kind), streams, dim=size.width)
        self.embedding = nn.Embedding(NUM_BYTES, size.width)
        # Expanded to (B·N, T, D), as the package has its streams: copies at the start, added up at the end.
        self.expand, self.reduce = get_expand_reduce_stream_functions(streams, disable=kind == "residual")
        self.blocks = nn.ModuleList(Block(connection, layer, size) for layer in range(size.layers))
        # One norm after the streams are added up: the sum of 4 copies is 4 times as large as one stream.
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, NUM_BYTES, bias=False)
        self._initialise(size)

    def _initialise(self, size: Size) -> None:
        nn.init.normal_(self.embedding.weight)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                # 2L branches write to the stream: with 1/√(2L) each its variance grows by 1 and not by 2L.
                writes = name.endswith((".out", ".down"))
                scale = 1 / math.sqrt(2 * size.layers) if writes else 1.0
                nn.init.normal_(module.weight, std=scale / math.sqrt(module.in_features))
        # All logits are zero: the first loss is ln 256 for every seed and kind.
        nn.init.zeros_(self.head.weight)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> LanguageOutput:
        """Predict each next byte.

        ``attention_mask``: (B, T). Padding must be on the right, where a causal model never looks at it; so the mask is
        only for whoever measures the model.
        ``labels``: (B, T), usually the ids themselves; shifted here; -100 is left out of the loss.
        Returns: Logits (B, T, V) and the mean loss in nats per byte.
        """
        streams = self.expand(self.embedding(input_ids))
        for block in self.blocks:
            streams = block(streams)
        logits = self.head(self.norm(self.reduce(streams)))
        if labels is None:
            return LanguageOutput(logits)
        # Shifted: the logits at a byte predict the next one, and the last has none.
        return LanguageOutput(logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


def connection_class(kind: str) -> Callable[..., nn.Module]:
    """The connection of that name, as the hyper-connections package publishes it.

    Returns: Taking the number of streams, ``dim``, ``branch`` and ``layer_index``.
    """
    if kind == "residual":
        return Residual
    if kind == "hc":
        return HyperConnections
    if kind == "mhc":
        # The same map computed with logarithms: 1.7 times as fast on a CPU.
        return partial(ManifoldConstrainedHyperConnections, log_domain_sinkhorn=True)
    raise InputError(f"got connection '{kind}', expected one of {', '.join(CONNECTIONS)}")


def build(kind: str, *, size: Size = Size(), seed: int = 0) -> SmallLM:
    """A model with the weights of this seed; everything but the connections is equal for the three kinds.

    ``seed``: of the initial weights. The connections themselves start from constants.
    """
    # Forked: a caller's own random numbers do not change, and every kind draws the same weights from the seed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallLM(kind, size)


def residual() -> SmallLM:
    """The demo's residual model, for ``depthscope probe depthscope.app.demo.small_lm:residual --weights FILE``."""
    return build("residual")


def hc() -> SmallLM:
    """The demo's hyper-connection model, for ``depthscope probe depthscope.app.demo.small_lm:hc --weights FILE``."""
    return build("hc")


def mhc() -> SmallLM:
    """The demo's mHC model, for ``depthscope probe depthscope.app.demo.small_lm:mhc --weights FILE``."""
    return build("mhc")
