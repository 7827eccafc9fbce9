"""Connections that nobody has seen: read by their roles in whatever order, layout and style they come, or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from depthscope import probes

N, D = 4, 16


class Connection(nn.Module):
    """One hand-written connection; what it returns, in which order and how the streams lie is told."""

    def __init__(self, returns: tuple[str, ...], *, axis: int = 2, static: bool = False, mixes: bool = True):
        super().__init__()
        self.returns, self.axis, self.static, self.mixes = returns, axis, static, mixes
        self.to_mix, self.to_pre, self.to_post = nn.Linear(D, N * N), nn.Linear(D, N), nn.Linear(D, N)
        self.base = nn.Parameter(torch.randn(N, N))

    def weights(self, x):  # x (B, T, N, D)
        mean = x.mean(2)
        if self.static:
            return self.base.softmax(-1), self.to_pre.bias.sigmoid(), self.to_post.bias.exp()
        mix = self.to_mix(mean).unflatten(-1, (N, N)).softmax(-1)
        return mix, self.to_pre(mean).sigmoid(), 2 * self.to_post(mean).sigmoid()

    def forward(self, streams):
        x = streams.movedim(self.axis, 2)
        mix, pre, post = self.weights(x)
        given = {
            "in": torch.einsum("...n,btnd->btd", pre, x)
            if pre.ndim == 1
            else torch.einsum("btn,btnd->btd", pre, x),
            "mix": mix,
            "mixed": (mix @ x if self.mixes else x).movedim(2, self.axis),
            "pre": pre,
            "post": post,
            "post column": post.unsqueeze(-1),
        }
        return tuple(given[name] for name in self.returns)


class Block(nn.Module):
    def __init__(self, returns, *, transposed=False, **options):
        super().__init__()
        self.connect = Connection(returns, **options)
        self.mlp = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Tanh())
        self.transposed = transposed

    def forward(self, streams):
        given = dict(zip(self.connect.returns, self.connect(streams), strict=True))
        x = streams.movedim(self.connect.axis, 2)
        pre = given.get("pre")
        branch = given["in"] if "in" in given else torch.einsum("btn,btnd->btd", pre, x)
        post = given["post"] if "post" in given else given["post column"].squeeze(-1)
        post = post.expand(*x.shape[:2], N)
        mix = given.get("mix", torch.eye(N))
        mixed = (mix.mT if self.transposed else mix) @ x
        if "mixed" in given:
            mixed = given["mixed"].movedim(self.connect.axis, 2)
        out = mixed + post.unsqueeze(-1) * self.mlp(branch).unsqueeze(-2)
        return out.movedim(2, self.connect.axis)


class Model(nn.Module):
    def __init__(self, returns, *, layers=3, **options):
        super().__init__()
        self.embed = nn.Embedding(64, N * D)
        self.blocks = nn.ModuleList(Block(returns, **options) for _ in range(layers))
        self.axis = options.get("axis", 2)

    def forward(self, ids):
        x = self.embed(ids).unflatten(-1, (N, D)).movedim(2, self.axis)
        for block in self.blocks:
            x = block(x)
        return x.movedim(self.axis, 2).mean(2)


def built(*args, **options) -> Model:
    torch.manual_seed(0)
    return Model(*args, **options).eval()


def expected(model: Model, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """States (B, T, N, D) and applied matrices (destination, source), by hand."""
    states, mixes = [], []
    x = model.embed(ids).unflatten(-1, (N, D)).movedim(2, model.axis)
    for block in model.blocks:
        canonical = x.movedim(model.axis, 2)
        states.append(canonical)
        mix = block.connect.weights(canonical)[0].expand(*ids.shape, N, N)
        mixes.append(mix.mT if block.transposed else mix)
        x = block(x)
    return [*states, x.movedim(model.axis, 2)], mixes


READ = {
    "as deepseek_v4 returns it": (("post", "mix", "in"), {}),
    "the matrix applied transposed": (("post", "mix", "in"), {"transposed": True}),
    "another order": (("in", "mix", "post"), {}),
    "read weights too": (("pre", "post", "mix", "in"), {}),
    "write weights before read weights": (("post", "pre", "in", "mix"), {}),
    "a column of write weights": (("in", "post column", "mix"), {}),
    "mixed streams in place of the matrix": (("in", "mixed", "post"), {}),
    "mixed streams first": (("mixed", "in", "post"), {}),
    "static weights": (("in", "mix", "post"), {"static": True}),
    "streams before tokens": (("in", "mix", "post"), {"axis": 1}),
    "streams outermost": (("in", "mix", "post"), {"axis": 0}),
    "weights alone": (("pre", "post", "mix"), {}),
}


@pytest.mark.parametrize("shape", [(3, 7), (1, 4), (4, 4), (2, 1)], ids=str)
@pytest.mark.parametrize("name", READ)
def test_a_connection_is_read_by_its_roles(name, shape):
    returns, options = READ[name]
    model = built(returns, **options)
    ids = torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states, mixes = expected(model, ids)
    run = probes.capture(model, ids)
    trace = run["trace"].to_dataset()
    assert run.attrs["n_streams"] == N
    assert run.attrs["family"] == "hc"
    assert run.attrs["orientation"] == "destination_source"
    assert run.attrs["reconstruction_error"] < 1e-5
    for depth, state in enumerate(states):
        np.testing.assert_allclose(trace.residual.values[depth], state.numpy(), atol=1e-6)
    for number, mix in enumerate(mixes):
        np.testing.assert_allclose(trace.h_res.values[number], mix.numpy(), atol=1e-6)
        pre = model.blocks[number].connect.weights(states[number])[1].detach().expand(*ids.shape, N)
        np.testing.assert_allclose(trace.h_pre.values[number], pre.numpy(), atol=1e-5)


@pytest.mark.slow(but=3, more=3)
@pytest.mark.parametrize("name", READ)
def test_later_steps_and_gradients_are_read_as_the_first(name):
    returns, options = READ[name]
    model = built(returns, **options)
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    with probes.record(model, gradients=True) as recorder:
        for _ in range(3):
            model(ids).square().mean().backward()
            recorder.step()
    assert recorder.errors == []
    once = probes.capture(model, ids, gradients=True, loss=lambda output, batch: output.square().mean())
    for variable in ("residual", "gradient", "h_res", "h_pre", "h_post", "branch_in", "branch_out"):
        np.testing.assert_allclose(
            recorder.run.trace[variable].values[:, 4:],
            once.trace[variable].values,
            atol=1e-6,
            err_msg=variable,
        )


@pytest.mark.parametrize("name", READ)
def test_a_batch_with_more_sequences_than_are_stored(name):
    returns, options = READ[name]
    model = built(returns, **options)
    ids = torch.randint(0, 64, (7, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, mixes = expected(model, ids)
    run = probes.capture(model, ids, max_sequences=3)
    trace = run["trace"].to_dataset()
    assert trace.sizes["sample"] == 3
    for number, mix in enumerate(mixes):
        np.testing.assert_allclose(trace.h_res.values[number], mix.numpy()[trace.sample.values], atol=1e-6)
    # the gains are those of every token, whichever sequences are stored
    everything = probes.capture(model, ids, max_sequences=7)
    np.testing.assert_allclose(
        run.statistics.gain_sum.values, everything.statistics.gain_sum.values, rtol=1e-5
    )


def test_streams_that_nothing_mixes():
    model = built(("in", "mixed", "post"), mixes=False)
    run = probes.capture(model, torch.randint(0, 64, (2, 7)))
    assert run.attrs["family"] == "independent_hc"
    assert run.attrs["orientation"] == "not_applicable"


class Discarding(Block):
    """Returns a matrix and does not apply it."""

    def forward(self, streams):
        branch, _, post = self.connect(streams)
        return streams + post.unsqueeze(-1) * self.mlp(branch).unsqueeze(-2)


def test_a_matrix_that_is_not_applied_is_told_and_the_identity_is_read():
    model = built(("in", "mix", "post"))
    for number in range(3):
        torch.manual_seed(number)
        model.blocks[number] = Discarding(("in", "mix", "post"))
    run = probes.capture(model, torch.randint(0, 64, (2, 7)))
    assert run.attrs["reconstruction_error"] < 1e-6
    np.testing.assert_array_equal(run.trace.h_res.values[0, 0, 0], np.eye(run.trace.sizes["stream"]))
    (remark,) = run.attrs["remarks"]
    assert "H_res is computed and discarded at all 3 connections" in remark["sentence"]
