"""Small language models with every kind of residual stream: plain, returned mHC, and lucidrains' connections."""

from __future__ import annotations

import torch
import transformers
from hyper_connections import hyper_connections as free
from hyper_connections import manifold_constrained_hyper_connections as constrained
from torch import nn

from tests.models.stream_models import deepseek_v4, perturbed


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return self.attend(y, y, y, need_weights=False)[0]


class Feedforward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        return self.net(x)


class LucidrainsLM(nn.Module):
    """A small language model on lucidrains' connections, with the branch inside them or in closure style."""

    def __init__(
        self, family: str, *, closure: bool = False, streams: int = 4, width: int = 32, layers: int = 3
    ):
        super().__init__()
        module = constrained if family == "mhc" else free
        # disable gives plain residual blocks of the same classes, so that families differ in the connections alone.
        init, self.expand, self.reduce = module.get_init_and_expand_reduce_stream_functions(
            streams, dim=width, disable=family == "residual"
        )
        self.closure = closure
        self.embed = nn.Embedding(64, width)
        branches = [(Attention(width), Feedforward(width)) for _ in range(layers)]
        if closure:
            rows = [nn.ModuleList([init(), attention, init(), feed]) for attention, feed in branches]
        else:
            rows = [
                nn.ModuleList([init(branch=attention), init(branch=feed)]) for attention, feed in branches
            ]
        self.layers = nn.ModuleList(rows)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 64)

    def forward(self, ids):
        x = self.expand(self.embed(ids))
        for row in self.layers:
            if self.closure:
                for connection, branch in (row[:2], row[2:]):
                    read, add = connection(x)
                    x = add(branch(read))
            else:
                x = row[1](row[0](x))
        return self.head(self.norm(self.reduce(x)))


def lucidrains(family: str, **options) -> nn.Module:
    torch.manual_seed(0)
    model = LucidrainsLM(family, **options)
    for name, parameter in model.named_parameters():
        if any(word in name for word in ("alpha", "beta", "_scale")):
            # Fresh connections are near the identity, which proves little
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def llama(**options) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


def deepseek(*, fresh: bool = False, layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = deepseek_v4(layers).eval()
    return model if fresh else perturbed(model)
