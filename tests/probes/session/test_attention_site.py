"""Attention is a site like others: over all batches, by name, in the coverage, in every measured step of a training loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import depthscope as ds
from depthscope.probes.structure.sites import SiteError
from tests.probes.session.test_attention import Attention, B, D, Net, T


def batches(count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def model(*how: str) -> nn.Module:
    torch.manual_seed(0)
    return Net([Attention(each) for each in how or ("softmax", "causal", "mask")])


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
    assert rows(run)["place_name"].tolist() == [f"blocks.{i}.attn.hook_pattern" for i in range(3)]
    assert (rows(run)["fired"] == 1).all()
    one = ds.capture(net, x, sites=["blocks.1.attn.hook_pattern", "post"])
    known = one.trace["query_entropy"].notnull().any(("sample", "head", "token"))
    assert known.values.tolist() == [False, True, False]  # after blocks 0, 1 and 2
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
