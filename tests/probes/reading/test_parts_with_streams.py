"""Streams in a part of the depth, and gates of features next to their weights: as the code's own numbers are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import depthscope as ds
from tests.models.recorded import read_model

WIDTH, STREAMS = 8, 3
BATCH = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = mlp()

    def forward(self, x):
        return x + self.branch(x)


class Joined(nn.Module):
    """A connection whose branch has a gate of its own: none, a gain for each feature, or one that a condition gives."""

    def __init__(self, gate: str = ""):
        super().__init__()
        self.branch, self.gate = mlp(), gate
        self.mix = nn.Parameter(torch.eye(STREAMS) + 0.3 * torch.randn(STREAMS, STREAMS))
        self.read, self.write = nn.Parameter(torch.randn(STREAMS)), nn.Parameter(torch.randn(STREAMS))
        self.gain, self.condition = nn.Parameter(torch.full((WIDTH,), 0.5)), nn.Linear(4, WIDTH)

    def forward(self, h, given):
        y = self.branch(torch.einsum("n,btnd->btd", self.read, h))
        if self.gate == "gain":
            y = y * self.gain
        if self.gate == "condition":
            y = self.condition(given)[:, None] * y
        return torch.einsum("mn,btnd->btmd", self.mix, h) + self.write[:, None] * y[:, :, None]


class Streams(nn.Module):
    """Plain blocks, blocks with streams, and plain blocks again."""

    def __init__(self, before: int = 0, inside: int = 3, after: int = 0, gate: str = ""):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2)
        self.before, self.after = (nn.ModuleList(Plain() for _ in range(n)) for n in (before, after))
        self.inside = nn.ModuleList(Joined(gate) for _ in range(inside))
        self.passed: list[torch.Tensor] = []

    def forward(self, batch):
        x = self.embed(batch)
        for block in self.before:
            x = block(x)
        h = x[:, :, None].expand(-1, -1, STREAMS, -1)
        self.passed = [h]
        for block in self.inside:
            h = block(h, batch.mean(1))
            self.passed.append(h)
        x = h.mean(2)
        for block in self.after:
            x = block(x)
        return self.head(x)


def compare(model: Streams) -> None:
    run = ds.capture(model, BATCH)
    trace, blocks = run["trace"], list(model.inside)

    assert trace.attrs["proof"] == "proven"
    with torch.no_grad():
        model(BATCH)
        np.testing.assert_allclose(trace["residual"], torch.stack(model.passed), atol=1e-6)
        for name, own in (("h_res", "mix"), ("h_pre", "read"), ("h_post", "write")):
            true = torch.stack([getattr(block, own) for block in blocks])[:, None, None]
            np.testing.assert_allclose(trace[name], true.expand(trace[name].shape), atol=1e-6)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (0, 2)])
def test_streams_in_a_part_of_the_depth_are_read_and_the_other_blocks_have_chains_of_their_own(before, after):
    model = Streams(before, 3, after)
    compare(model)

    found = {memory.name: len(memory.connections) for memory in read_model(model, BATCH).memories}
    assert found.pop("inside") == 3
    assert found == {name: n for name, n in (("before", before), ("after", after)) if n}
    for name in found:
        states = ds.capture(model, BATCH, chain=name)["trace"]["residual"]
        assert states.sizes["depth"] == found[name] + 1
        assert states.sizes["stream"] == 1


class OtherCount(Streams):
    """A stream joins after two blocks, or leaves."""

    def __init__(self, counts: tuple[int, int]):
        super().__init__(inside=4)
        self.counts = counts
        for block, n in zip(self.inside, (counts[0], counts[0], counts[1], counts[1]), strict=True):
            block.mix = nn.Parameter(block.mix[:n, :n].detach())
            block.read, block.write = (nn.Parameter(of[:n].detach()) for of in (block.read, block.write))

    def forward(self, batch):
        h = self.embed(batch)[:, :, None].expand(-1, -1, self.counts[0], -1)
        self.passed = [h]
        for number, block in enumerate(self.inside):
            if number == 2:
                h = torch.cat([h, h.mean(2, keepdim=True)], 2)[:, :, : self.counts[1]]
                self.passed.append(h)
            h = block(h, batch.mean(1))
            self.passed.append(h)
        return self.head(h.mean(2))


@pytest.mark.parametrize("counts", [(2, 3), (3, 2)])
def test_parts_with_other_numbers_of_streams_have_chains_of_their_own(counts):
    model = OtherCount(counts)
    for chain, part in (("inside", slice(0, 3)), ("inside#2", slice(3, 6))):
        trace = ds.capture(model, BATCH, chain=chain)["trace"]
        assert trace.attrs["proof"] == "proven"
        with torch.no_grad():
            model(BATCH)
        np.testing.assert_allclose(trace["residual"], torch.stack(model.passed[part]), atol=1e-6)


@pytest.mark.parametrize("gate", ["gain", "condition"])
def test_a_gate_of_each_feature_is_a_part_of_the_branch_next_to_the_weights_of_streams(gate):
    model = Streams(gate=gate)
    compare(model)
    with torch.no_grad():  # after training, say: no longer the same number for all features
        for block in model.inside:
            block.gain.copy_(torch.rand(WIDTH))
    compare(model)
