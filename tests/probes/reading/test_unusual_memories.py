"""Memories in unusual places: each small network notes its own states and weights, which are compared with a capture's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import depthscope as ds

WIDTH, STREAMS, DEPTH = 16, 3, 4


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
    )


class Network(nn.Module):
    """An embedding, branches, weights of streams, and what a forward noted."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.branches = nn.ModuleList(mlp() for _ in range(DEPTH))
        self.res = nn.Parameter(torch.eye(STREAMS) + 0.2 * torch.randn(DEPTH, STREAMS, STREAMS))
        self.pre, self.post = (nn.Parameter(torch.rand(DEPTH, STREAMS) + 0.2) for _ in range(2))

    def note(self, state):
        self.passed.append(state)
        return state

    def forward(self, x):
        self.passed: list[torch.Tensor] = []
        return self.run(self.embed(x))


class Interleaved(Network):
    """Streams are neighbours in the axis of the features."""

    def __init__(self):
        super().__init__(STREAMS * WIDTH)

    def run(self, x):
        self.note(x.unflatten(-1, (WIDTH, STREAMS)).mT)
        for number, branch in enumerate(self.branches):
            v = x.view(*x.shape[:2], WIDTH, STREAMS)
            added = branch(v @ self.pre[number])
            x = (v @ self.res[number].T + added[..., None] * self.post[number]).reshape(x.shape)
            self.note(x.unflatten(-1, (WIDTH, STREAMS)).mT)
        return self.head(x)


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


@pytest.mark.parametrize("kind", [Interleaved, Buffer, Injected, Flat])
def test_streams_are_found_where_they_lie(kind):
    model, x = kind(), torch.randn(2, 6, 5)
    run = ds.capture(model, x)
    assert run.attrs["proof"] == "proven"
    assert not any("do not persist" in remark for remark in run.attrs.get("remarks", ()))
    found = torch.from_numpy(run["trace"].residual.values)
    torch.testing.assert_close(found, torch.stack(model.passed).detach(), rtol=1e-4, atol=1e-5)
    h_res, h_post = (torch.from_numpy(run["trace"][name].values) for name in ("h_res", "h_post"))
    torch.testing.assert_close(
        h_res, model.res.detach()[:, None, None].expand(h_res.shape), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        h_post, model.post.detach()[:, None, None].expand(h_post.shape), rtol=1e-4, atol=1e-5
    )


class SideSums(Network):
    """Every second branch reads the state and what another branch makes of it, which is not handed on."""

    def __init__(self):
        super().__init__()
        self.side = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def run(self, x):
        first = self.note(x)
        for number, branch in enumerate(self.branches):
            extra = self.side(torch.cat([x, first], -1)) if number % 2 else 0
            x = self.note(x + branch(x + extra))
        return self.head(x)


class Conditioned(Network):
    """Gates are computed from a condition, by more weights than the embedding has."""

    def __init__(self):
        super().__init__()
        self.condition = nn.Linear(5, 2 * DEPTH * WIDTH)

    def forward(self, x):
        self.gates = self.condition(x[:, 0])[:, None].chunk(2 * DEPTH, -1)
        return super().forward(x)

    def run(self, x):
        self.note(x)
        for number, branch in enumerate(self.branches):
            gate, shift = self.gates[2 * number : 2 * number + 2]
            x = self.note(torch.addcmul(x, gate, branch(x + shift)))
        return self.head(x)


class Joined(Network):
    """State and branches are put next to one another along the features, taken apart, and added up."""

    def run(self, x):
        self.note(x)
        for number, branch in enumerate(self.branches):
            parts = torch.cat([x, branch(x), self.branches[number - 1](x)], -1).unflatten(-1, (3, WIDTH))
            x = self.note((parts * self.pre[number, :, None]).sum(-2))
        return self.head(x)


class PositionsAgain(Network):
    """Post-norm, and every branch reads the state and the first one again, as queries with their embedding."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(DEPTH))

    def run(self, x):
        first = self.note(x)
        for branch, norm in zip(self.branches, self.norms, strict=True):
            x = self.note(norm(x + branch(x + first)))
        return self.head(x)


@pytest.mark.parametrize("kind", [SideSums, Conditioned, Joined, PositionsAgain])
def test_states_are_those_that_are_handed_on(kind):
    model, x = kind(), torch.randn(2, 6, 5)
    run = ds.capture(model, x)
    assert run.attrs["proof"] == "proven"
    found = torch.from_numpy(run["trace"].residual.values)[:, :, :, 0]
    torch.testing.assert_close(found, torch.stack(model.passed).detach(), rtol=1e-4, atol=1e-5)


class FusedReads(Network):
    """Each branch reads a mixture of all earlier outputs, by the fused kernel of attention."""

    def __init__(self):
        super().__init__()
        self.queries, self.norm = nn.Parameter(torch.randn(DEPTH + 1, WIDTH)), nn.RMSNorm(WIDTH)

    def read(self, outputs, number):
        values = torch.stack(outputs, 2)
        keys, query = self.norm(values), self.queries[number].expand(*values.shape[:2], 1, -1)
        self.weights.append((query @ keys.mT / WIDTH**0.5).softmax(-1).detach())
        return functional.scaled_dot_product_attention(query, keys, values).squeeze(2)

    def run(self, x):
        self.weights, outputs = [], [x]
        for number, branch in enumerate(self.branches):
            outputs.append(branch(self.note(self.read(outputs, number))))
        return self.head(self.note(self.read(outputs, DEPTH)))


def test_fused_attention_over_earlier_outputs_is_a_read_over_depth():
    model, x = FusedReads(), torch.randn(2, 6, 5)
    run = ds.capture(model, x)
    assert run.attrs["proof"] == "proven"
    found = torch.from_numpy(run["trace"].residual.values)[:, :, :, 0]
    torch.testing.assert_close(found, torch.stack(model.passed).detach(), rtol=1e-4, atol=1e-5)
    for number, weights in enumerate(model.weights[1:DEPTH], 1):
        read = torch.from_numpy(run["trace"].depth_read.values)[number, :, :, : number + 1]
        torch.testing.assert_close(read, weights[:, :, 0], rtol=1e-4, atol=1e-5)


class MeanOfEarlier(Network):
    """The mean of all earlier states is added in each step."""

    def run(self, x):
        states = [self.note(x)]
        for branch in self.branches:
            states.append(0.5 * states[-1] + 0.5 * torch.stack(states).mean(0) + branch(states[-1]))
        return self.head(states[-1])


def loss(output, batch):
    return output.square().flatten(1).mean(1)


def test_a_block_that_is_left_out_of_mixtures_over_depth_is_one_branch():
    model, x = MeanOfEarlier(), torch.randn(3, 6, 5)
    found = ds.interventions.ablate(model, x, "skip", loss=loss).loss_change.values.ravel()
    with torch.no_grad():
        base = loss(model(x), x).mean()
        true = []
        for branch in model.branches:
            hook = branch.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
            true.append(loss(model(x), x).mean() - base)
            hook.remove()
    torch.testing.assert_close(torch.from_numpy(found).float(), torch.stack(true), rtol=1e-3, atol=1e-5)
