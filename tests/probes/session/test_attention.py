"""What the queries attend to, against weights computed by hand; what only looks like attention is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import depthscope as ds
from depthscope import SiteError

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
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=added[None, None].expand(len(x), 1, T, T))
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


def test_a_softmax_over_streams_or_experts_is_no_attention(x):
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.choose, self.experts = nn.Linear(D, 4), nn.Parameter(torch.randn(4, D, D) / 4)

        def forward(self, x):
            chosen = self.choose(x).softmax(-1)  # (B, T, 4)
            return torch.einsum("bte,bted->btd", chosen, torch.einsum("btd,edf->btef", x, self.experts))

    torch.manual_seed(0)
    run = ds.capture(Net([Router() for _ in range(3)]), x)
    assert "query_entropy" not in run.trace
    assert "attention" not in run["coverage"]["site"].values


def test_windows_in_the_axis_of_sequences_are_refused_with_the_reason(x):
    class Windowed(Attention):
        def forward(self, x):
            windows = x.reshape(2 * B, T // 2, D)
            q, k, v = self.heads(windows)
            return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2).reshape(x.shape)

    torch.manual_seed(0)
    run = ds.capture(Net([Windowed("softmax") for _ in range(3)]), x)
    assert "query_entropy" not in run.trace
    assert any("do not tell the 3 sequences" in why for why in run["coverage"]["why"].values)


def test_every_query_on_one_token_is_found(x):
    torch.manual_seed(0)
    model = Net([Attention("causal") for _ in range(4)]).eval()
    analysis = ds.analyze(ds.capture(model, x))
    assert "attention_entropy_collapse" not in {f.verdict for f in ds.judge(analysis)}
    with torch.no_grad():
        model.blocks[2].qkv.weight[: 2 * D].mul_(100)
    run = ds.capture(model, x)
    findings = ds.judge(ds.analyze(ds.settle(run, model, x)))
    (found,) = [f for f in findings if f.verdict == "attention_entropy_collapse"]
    assert (found.severity.name, found.first, found.last) == ("WARN", 3, 3)


# --- as a site


def batches(count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def model(*how: str) -> nn.Module:
    torch.manual_seed(0)
    return Net([Attention(each) for each in how or ("softmax", "causal", "mask", "added")])


def by_hand(net, x):
    """Entropy over that of uniform weights, and the weight on the first key, of queries with two keys or more."""
    shares, sinks, state = [], [], x
    with torch.no_grad():
        for block in net.blocks:
            weights = block.weights(state).double()[..., 1:, :]
            shares.append(torch.special.entr(weights).sum(-1) / torch.arange(2, T + 1).log())
            sinks.append(weights[..., 0])
            state = state + block(state)
    return torch.stack(shares), torch.stack(sinks)  # (depth, B, H, T − 1)


def rows(run, site="attention"):
    table = run["coverage"].to_dataset().to_dataframe()
    return table[table["site"] == site]


def test_every_batch_of_a_capture_counts():
    net, parts = model(), batches()
    run = ds.capture(net, parts, max_sequences=9)
    each = [ds.capture(net, part).trace["query_entropy"].values for part in parts]
    np.testing.assert_array_equal(run.trace["query_entropy"], np.concatenate(each, axis=1))
    analysis = ds.analyze(run, metrics=["attention_entropy", "sink_mass"]).isel(step=0)
    shares, sinks = by_hand(net, torch.cat(parts))
    np.testing.assert_allclose(analysis["attention_entropy"][1:], shares.mean((1, 3)), rtol=1e-5)
    np.testing.assert_allclose(analysis["sink_mass"][1:], sinks.mean((1, 3)), rtol=1e-5)
    assert analysis["attention_entropy"][0].isnull().all()
    # The error of a mean over nine sequences.
    error = shares.mean(-1).std(1, correction=1) / 3
    np.testing.assert_allclose(analysis["attention_entropy_stderr"][1:], error, rtol=1e-4)
    # And the sums of every query of every batch.
    sums = run.statistics["attention_entropy_sum"].isel(step=0) / run.statistics[
        "attention_query_count"
    ].isel(step=0)
    np.testing.assert_allclose(sums[1:], shares.mean((1, 3)), rtol=1e-5)


def test_it_has_a_name_and_is_covered():
    net, x = model(), batches(1)[0]
    run = ds.capture(net, x, sites=["attention"])
    assert "query_entropy" in run.trace
    assert rows(run)["place_name"].tolist() == [f"blocks.{i}.attn.hook_pattern" for i in range(4)]
    assert (rows(run)["fired"] == 1).all()
    one = ds.capture(net, x, sites=["blocks.1.attn.hook_pattern", "post"])
    known = one.trace["query_entropy"].notnull().any(("sample", "head", "token"))
    assert known.values.tolist() == [False, True, False, False]  # after blocks 0 to 3
    assert "query_entropy" not in ds.capture(net, x, sites=["post"]).trace
    assert ds.describe(net, x).coverage[-1]["site"] == "attention"


@pytest.mark.parametrize("site", ["attention", "blocks.7.attn.hook_pattern"])
def test_a_site_that_does_not_exist_is_refused(site):
    plain = Net([nn.Linear(D, D) for _ in range(3)])
    with pytest.raises(SiteError, match="did not fire"):
        ds.capture(plain if site == "attention" else model(), batches(1)[0], sites=[site])


def train(net, parts, **options):
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    expected = []
    with ds.record(net, gradients=True, **options) as recorder:
        for x in parts:
            expected.append(by_hand(net, x))
            net(x).square().mean().backward()
            recorder.step()
            optimizer.step()
            optimizer.zero_grad()
    return recorder, expected


def test_a_training_loop_measures_what_is_named():
    recorder, expected = train(model(), batches(), sites=["attention", "embed", "post"], max_sequences=B)
    statistics = recorder.run.statistics
    for step, (shares, sinks) in enumerate(expected):
        row = statistics.isel(step=step)
        assert (row["attention_query_count"][1:] == B * (T - 1)).all()
        np.testing.assert_allclose(row["attention_entropy_sum"][1:], shares.sum((1, 3)), rtol=1e-5)
        np.testing.assert_allclose(row["sink_mass_sum"][1:], sinks.sum((1, 3)), rtol=1e-5)
    curves = ds.diagnostics.training_curves(recorder.run)
    np.testing.assert_allclose(curves["attention_entropy"][2, 1:], expected[2][0].mean((1, 3)), rtol=1e-5)
