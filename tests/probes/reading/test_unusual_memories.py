"""Memories in unusual places: each small network notes its own states and weights, which are compared with a capture's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import depthscope as ds

WIDTH, STREAMS, DEPTH = 16, 3, 4


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
    )


class Network(nn.Module):
    """An embedding, branches, weights of streams, and what a forward noted."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.branches = nn.ModuleList(mlp() for _ in range(DEPTH))
        self.res = nn.Parameter(torch.eye(STREAMS) + 0.2 * torch.randn(DEPTH, STREAMS, STREAMS))
        self.pre, self.post = (nn.Parameter(torch.rand(DEPTH, STREAMS) + 0.2) for _ in range(2))

    def note(self, state):
        self.passed.append(state)
        return state

    def forward(self, x):
        self.passed: list[torch.Tensor] = []
        return self.run(self.embed(x))


class Buffer(Network):
    """The streams of the next state are written into an empty tensor: first what the branch gives, then the mixture."""

    def run(self, x):
        streams = torch.empty(STREAMS, *x.shape)
        for stream in range(STREAMS):
            streams[stream].copy_(x * (1 + stream))
        self.note(streams.permute(1, 2, 0, 3))
        for number, branch in enumerate(self.branches):
            added = branch(sum(self.pre[number, i] * streams[i] for i in range(STREAMS)))
            after = torch.empty_like(streams)
            for o in range(STREAMS):
                after[o].copy_(self.post[number, o] * added)
                for i in range(STREAMS):
                    after[o].add_(self.res[number, o, i] * streams[i])
            streams = after
            self.note(streams.permute(1, 2, 0, 3))
        return self.head(streams.mean(0))


class Injected(Network):
    """The embedding is added to all streams again in each step."""

    def run(self, x):
        streams = self.note(x[:, :, None] * torch.tensor([[1.0], [0.6], [0.2]]))
        for number, branch in enumerate(self.branches):
            mixed = torch.einsum("oi,btid->btod", self.res[number], streams) + 0.3 * x[:, :, None]
            added = branch(torch.einsum("i,btid->btd", self.pre[number], streams))
            streams = self.note(mixed + self.post[number][:, None] * added[:, :, None])
        return self.head(streams.mean(2))


class Flat(Network):
    """A step is one product of matrices: streams by all the others."""

    def run(self, x):
        state = x.expand(STREAMS, *x.shape).contiguous()
        self.note(state.permute(1, 2, 0, 3))
        for number, branch in enumerate(self.branches):
            streams = state.view(STREAMS, -1)
            added = branch((self.pre[number, None] @ streams).view(x.shape)).reshape(1, -1)
            streams = torch.addmm(self.post[number, :, None] @ added, self.res[number], streams)
            state = streams.view(STREAMS, *x.shape)
            self.note(state.permute(1, 2, 0, 3))
        return self.head(state.sum(0))


@pytest.mark.parametrize("kind", [Buffer, Injected, Flat])
def test_streams_are_found_where_they_lie(kind):
    model, x = kind(), torch.randn(2, 6, 5)
    run = ds.capture(model, x)
    assert run.attrs["proof"] == "proven"
    assert not any("do not persist" in remark for remark in run.attrs.get("remarks", ()))
    found = torch.from_numpy(run["trace"].residual.values)
    model(x)  # a capture puts back what its forward noted
    torch.testing.assert_close(found, torch.stack(model.passed).detach(), rtol=1e-4, atol=1e-5)
    h_res, h_post = (torch.from_numpy(run["trace"][name].values) for name in ("h_res", "h_post"))
    torch.testing.assert_close(
        h_res, model.res.detach()[:, None, None].expand(h_res.shape), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        h_post, model.post.detach()[:, None, None].expand(h_post.shape), rtol=1e-4, atol=1e-5
    )
