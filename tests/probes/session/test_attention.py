"""What the queries attend to, against weights computed by hand; what only looks like attention is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import depthscope
from depthscope import probes

B, T, D, H = 3, 6, 16, 2


class Attention(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.how, self.qkv = how, nn.Linear(D, 3 * D)
        self.norm = nn.LayerNorm(D)
        nn.init.normal_(self.qkv.weight, std=0.5)

    def heads(self, x):
        return self.qkv(self.norm(x)).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)

    def weights(self, x):
        q, k, _ = self.heads(x)
        logits = q @ k.mT / math.sqrt(D / H)
        return logits.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf).softmax(-1)

    def forward(self, x):
        q, k, v = self.heads(x)
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        if self.how == "softmax":
            y = F.dropout(self.weights(x), 0.0) @ v
        elif self.how == "causal":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.how == "mask":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=~later)
        else:
            added = torch.zeros(T, T).masked_fill(later, torch.finfo(torch.float32).min)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=added[None, None].expand(B, 1, T, T))
        return y.transpose(1, 2).flatten(2)


class Net(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.fixture
def x():
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("how", ["softmax", "causal", "mask", "added"])
def test_entropy_and_sink_of_each_head_are_those_of_the_weights(x, how):
    torch.manual_seed(0)
    model = Net([Attention(how) for _ in range(3)]).eval()
    analysis = depthscope.analyze(probes.capture(model, x)).isel(step=0)
    with torch.no_grad():
        state = x
        for depth, block in enumerate(model.blocks, start=1):
            weights = block.weights(state).double()
            # The first query sees one key.
            entropy = torch.special.entr(weights).sum(-1)[..., 1:] / torch.arange(2, T + 1).log()
            found = analysis["attention_entropy"].isel(depth=depth)
            np.testing.assert_allclose(found, entropy.mean((0, 2)), rtol=1e-5)
            np.testing.assert_allclose(
                analysis["sink_mass"].isel(depth=depth), weights[..., 1:, 0].mean((0, 2)), rtol=1e-5
            )
            state = state + block(state)
    assert analysis["attention_entropy"].isel(depth=0).isnull().all()
    assert analysis["attention_entropy"].sizes["head"] == H


def test_torchs_own_attention_with_its_heads_in_the_axis_of_sequences(x):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(D, H, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, average_attn_weights=False)[0]

    torch.manual_seed(0)
    model = Net([Own() for _ in range(3)]).eval()
    run = probes.capture(model, x, gradients=True, loss=lambda output, batch: output.square().mean())
    weights = model.blocks[0].attention(x, x, x, average_attn_weights=False)[1].detach()
    entropy = torch.special.entr(weights).sum(-1)
    np.testing.assert_allclose(run.trace["query_entropy"].isel(depth=1), entropy, rtol=1e-5)


def test_a_softmax_over_streams_or_experts_is_no_attention(x):
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.choose, self.experts = nn.Linear(D, 4), nn.Parameter(torch.randn(4, D, D) / 4)

        def forward(self, x):
            chosen = self.choose(x).softmax(-1)  # (B, T, 4)
            return torch.einsum("bte,bted->btd", chosen, torch.einsum("btd,edf->btef", x, self.experts))

    torch.manual_seed(0)
    run = probes.capture(Net([Router() for _ in range(3)]), x)
    assert "query_entropy" not in run.trace
    assert "attention" not in run["coverage"]["site"].values


def test_windows_in_the_axis_of_sequences_are_refused_with_the_reason(x):
    class Windowed(Attention):
        def forward(self, x):
            windows = x.reshape(2 * B, T // 2, D)
            q, k, v = self.heads(windows)
            return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2).reshape(x.shape)

    torch.manual_seed(0)
    run = probes.capture(Net([Windowed("softmax") for _ in range(3)]), x)
    assert "query_entropy" not in run.trace
    assert any("do not tell the 3 sequences" in why for why in run["coverage"]["why"].values)


def test_every_query_on_one_token_is_found(x):
    torch.manual_seed(0)
    model = Net([Attention("causal") for _ in range(4)]).eval()
    analysis = depthscope.analyze(probes.capture(model, x))
    assert "attention_entropy_collapse" not in {f.verdict for f in depthscope.judge(analysis)}
    with torch.no_grad():
        model.blocks[2].qkv.weight[: 2 * D].mul_(100)
    run = probes.capture(model, x)
    findings = depthscope.judge(depthscope.analyze(probes.settle(run, model, x)))
    (found,) = [f for f in findings if f.verdict == "attention_entropy_collapse"]
    assert (found.severity.name, found.first, found.last) == ("WARN", 3, 3)
