"""With what a memory begins and ends, in small networks after public code that were once misread, refused or crashed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import depthscope as ds
from depthscope.probes.model.layout import LayoutError
from tests.probes.reading.test_once_misread import WIDTH, Trunk, difference, mlp, noted


class Streams(Trunk):
    """n streams as tensors in a list, which static weights read, mix and write; ``start`` says how they begin."""

    def __init__(self, start: str):
        super().__init__(head=nn.Linear(WIDTH, 3))
        self.start, n = start, 3
        self.starts = nn.ModuleList(nn.Linear(5, WIDTH) for _ in range(n))
        self.mix = nn.Parameter(torch.eye(n) + 0.1 * torch.randn(3, n, n))
        self.read, self.write = nn.Parameter(torch.rand(3, n)), nn.Parameter(torch.rand(3, n))

    def first(self, x):
        if self.start == "projections in a list":
            return [project(x) for project in self.starts]
        one, n = self.embed(x), len(self.starts)
        if self.start == "a stack of one":
            return torch.stack([one] * n, -2).unbind(-2)
        return one.unsqueeze(-2).repeat_interleave(n, -2).unbind(-2)

    def forward(self, x):
        streams = self.first(x)
        self.passed = [torch.stack(list(streams), -2)]
        for number, branch in enumerate(self.branches):
            out = branch(sum(w * s for w, s in zip(self.read[number], streams, strict=True)))
            streams = [
                sum(m * s for m, s in zip(row, streams, strict=True)) + w * out
                for row, w in zip(self.mix[number], self.write[number], strict=True)
            ]
            self.passed.append(torch.stack(streams, -2))
        return self.head(sum(streams))


@pytest.mark.parametrize(
    ("start", "shape"),
    [("projections in a list", (7, 5)), ("a stack of one", (2, 6, 5)), ("repeated", (7, 5))],
)
def test_streams_in_a_list_are_read_however_they_begin(start, shape):
    model, x = Streams(start).eval(), torch.randn(*shape)
    run = ds.capture(model, x, max_sequences=16)
    assert run.attrs["proof"] == "proven"
    for found, passed in zip(run.trace.residual.values, noted(model, x), strict=True):
        assert difference(found, passed) < 1e-6
    for found, true in zip(run.trace.h_res.values, model.mix, strict=True):
        assert difference(found[0, 0], true.detach()) < 1e-5


class LastMixture(Trunk):
    """Attention over depth of which the head reads the last mixture and the last output, and not a mixture of all."""

    def __init__(self, norm: str):
        super().__init__()
        self.queries, self.norm = nn.Parameter(torch.randn(3, WIDTH)), norm

    def forward(self, x):
        values = [self.embed(x)]
        for query, branch in zip(self.queries, self.branches, strict=True):
            stack = torch.stack(values, 2)
            h = ((stack * query).sum(-1).softmax(-1).unsqueeze(-1) * stack).sum(2)
            if self.norm == "by a norm":
                taken = h / (h.norm(dim=-1, keepdim=True) / WIDTH**0.5)
            else:
                taken = h / h.abs().mean(-1, keepdim=True)
            values.append(branch(taken))
        return self.head(h + values[-1])


@pytest.mark.parametrize("norm", ["by a norm", "by a mean"])
def test_a_history_ends_with_the_last_sum_and_a_norm_is_no_weight_of_a_read(norm):
    run = ds.capture(LastMixture(norm).eval(), torch.randn(2, 6, 5))
    assert run.attrs["proof"] == "proven"
    assert run.attrs["family"] == "depth_attention"
    assert difference(run.trace.depth_read.sum("source").values, torch.ones(3, 2, 6)) < 1e-5


class Queries(Trunk):
    """A decoder after DETR: its state begins with zeros, goes through norms, and attends to what the encoder gives."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(4, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.decoder = nn.ModuleList(mlp() for _ in range(3))

    def forward(self, x):
        for branch in self.branches:
            x = (seen := self.embed(x) if x.shape[-1] == 5 else x) + branch(seen)
        state = torch.zeros(len(x), 4, WIDTH)
        for norm, layer in zip(self.norms, self.decoder, strict=True):
            scores = ((state + self.queries) @ x.mT).softmax(-1)
            state = norm(state + layer(scores @ x))
        return self.head(state)


def test_a_decoder_that_begins_with_zeros_is_a_tower():
    run = ds.capture(Queries().eval(), torch.randn(2, 6, 5))
    assert run.attrs["proof"] == "proven"
    assert sorted(of.sizes["token"] for of in run["trace"].children.values()) == [4, 6]


class Packed(Trunk):
    """Attention over all rows, as of the patches of several images in one axis."""

    def step(self, number, branch, x):
        return x + (x @ x.mT).softmax(-1) @ branch(x)


def test_packed_tokens_are_refused_unless_they_are_said_to_be_of_one_sequence():
    model, rows = Packed().eval(), torch.randn(12, 5)
    with pytest.raises(LayoutError, match="layout='T D'"):
        ds.capture(model, rows)
    run = ds.capture(model, rows, layout="T D")
    assert run.trace.residual.shape == (4, 1, 12, 1, WIDTH)
    assert run.attrs["proof"] == "proven"
    assert difference(run.trace.residual.values[-1], noted(model, rows)[-1]) < 1e-6
