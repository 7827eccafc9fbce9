"""lucidrains' connections in every version and style, against a step of their own two methods computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from einops import rearrange
from hyper_connections import hyper_connections as free
from hyper_connections import hyper_connections_channel_first as convolved
from hyper_connections import hyper_connections_with_multi_branch_inputs as several
from hyper_connections import manifold_constrained_hyper_connections as constrained
from hyper_connections import mHCv2 as second
from torch import nn

from depthscope import probes

WIDTH, LAYERS = 16, 3


class Feedforward(nn.Module):
    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh())

    def forward(self, x):
        return self.net(x)


class Model(nn.Module):
    """A stack of connections: with the branch inside, in closure style, or by their two methods alone."""

    def __init__(self, connection, *, streams: int, style: str, version: str, branch=Feedforward):
        super().__init__()
        self.streams, self.style, self.version = streams, style, version
        inside = style == "inside"
        self.embed = nn.Embedding(64, WIDTH)
        self.connections = nn.ModuleList(
            connection(streams, dim=WIDTH, layer_index=i, branch=branch() if inside else None)
            for i in range(LAYERS)
        )
        self.branches = nn.ModuleList(branch() for _ in range(0 if inside else LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def spread(self, x):
        return (
            x.repeat_interleave(self.streams, 0)
            if self.version == "first"
            else x.unsqueeze(2).repeat(1, 1, self.streams, 1)
        )

    def forward(self, ids):
        x = self.spread(self.embed(ids))
        for number, connection in enumerate(self.connections):
            if self.style == "inside":
                x = connection(x)
            elif self.style == "closure":
                branch_in, add = connection(x)
                x = add(self.branches[number](branch_in))
            else:
                branch_in, rest, weights = connection.width_connection(x)
                x = connection.depth_connection(self.branches[number](branch_in), rest, **weights)
        if self.version == "first":
            return self.norm(rearrange(x, "(b s) t d -> b t s d", s=self.streams).sum(2))
        return self.norm(x.sum(2))


def built(connection, streams=4, style="inside", version="first", branch=Feedforward) -> Model:
    torch.manual_seed(0)
    model = Model(connection, streams=streams, style=style, version=version, branch=branch)
    for name, parameter in model.named_parameters():
        if any(word in name for word in ("alpha", "beta", "_scale")):
            nn.init.normal_(
                parameter, std=0.5
            )  # fresh connections are near the identity, which proves little
    return model.eval()


def fractions(connection, count: int):
    return lambda streams, **options: connection(streams, num_fracs=count, **options)


def two_inputs(streams, **options):
    return several.HyperConnections(streams, num_branch_inputs=2, **options)


CASES = {
    "hc in fractions": (fractions(free.HyperConnections, 2), 4, "first", "hc", 2),
    "hc": (free.HyperConnections, 4, "first", "hc", 1),
    "mhc": (constrained.mHC, 4, "first", "mhc", 1),
    "mhc v2": (second.mHC, 4, "second", "mhc", 1),
    # Its Sinkhorn runs over 4 × 9 numbers, so that the rows sum to 1 and the columns to 0.44: as measured it is no mHC.
    "mhc in fractions": (fractions(constrained.mHC, 2), 4, "first", "hc", 2),
    "as many fractions as streams, v2": (fractions(second.mHC, 2), 2, "second", "mhc", 2),
    "two branch inputs": (two_inputs, 4, "first", "hc", 2),
}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("case", "style"),
    [*((case, "inside") for case in CASES), ("mhc", "closure"), ("hc in fractions", "methods")],
)
def test_every_version_and_style_is_read_and_proven(case, style, ids):
    connection, streams, version, family, views = CASES[case]
    model = built(connection, streams, style, version)
    run = probes.capture(model, ids, gradients=True, loss=lambda output, batch: output.square().mean())
    trace = run["trace"].to_dataset()
    fracs = getattr(model.connections[0], "num_fracs", 1)
    assert run.attrs["family"] == family
    assert run.attrs["n_streams"] == streams * fracs
    assert run.attrs["reconstruction_error"] < 1e-6
    assert run.attrs["orientation"] == "destination_source"
    assert dict(trace.sizes) | {"depth": 4, "stream": streams * fracs, "feature": WIDTH // fracs} == dict(
        trace.sizes
    )
    assert ("h_pre" in trace) == (views == 1)
    assert trace.sizes.get("view_in", 1) == trace.sizes.get("view_out", 1) == views
    assert (np.abs(trace.gradient.values).max(axis=(1, 2, 3, 4)) > 0).all()
    assert np.isfinite(trace.gradient.values).all()

    states = [model.spread(model.embed(ids))]
    for number, module in enumerate(model.connections):
        branch_in, rest, weights = module.width_connection(states[-1])
        np.testing.assert_allclose(
            canonical(
                rest if rest.ndim == states[-1].ndim else rearrange(rest, "b t s d -> (b s) t d"),
                model,
                fracs,
            ),
            np.einsum("ktoi,ktid->ktod", trace.h_res.values[number], canonical(states[-1], model, fracs)),
            atol=1e-5,
        )
        branch = (
            model.branches[number]
            if style != "inside"
            else getattr(module, "branch", None) or module.branches[0]
        )
        states.append(module.depth_connection(branch(branch_in), rest, **weights))
    for depth, state in enumerate(states):
        np.testing.assert_allclose(trace.residual.values[depth], canonical(state, model, fracs), atol=1e-5)


def canonical(state: torch.Tensor, model: Model, fracs: int) -> np.ndarray:
    merged = "(b s) t (f d) -> b t (s f) d" if model.version == "first" else "b t s (f d) -> b t (s f) d"
    options = {"s": model.streams} if model.version == "first" else {}
    return rearrange(state, merged, f=fracs, **options).detach().numpy()


@pytest.mark.parametrize("version", [convolved.HyperConnections, free.HyperConnections])
def test_images_with_channels_first(version):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            options = {} if version is convolved.HyperConnections else {"channel_first": True}
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.blocks = nn.ModuleList(
                version(4, dim=8, branch=nn.Conv2d(8, 8, 3, padding=1), **options) for _ in range(3)
            )

        def forward(self, image):
            x = self.stem(image).repeat_interleave(4, 0)
            for block in self.blocks:
                x = block(x)
            return x.unflatten(0, (-1, 4)).sum(1)

    torch.manual_seed(0)
    model = Net().eval()
    for name, parameter in model.named_parameters():
        if any(word in name for word in ("alpha", "beta", "_scale")):
            nn.init.normal_(parameter, std=0.5)
    run = probes.capture(model, torch.randn(2, 3, 6, 5))
    assert run.attrs["layout"] == "(B N) D H W"
    assert run.attrs["reconstruction_error"] < 1e-6
    assert run.trace.sizes["token"] == 30


def test_several_input_views_share_one_branch(ids):
    class Product(Feedforward):
        def forward(self, views):
            return super().forward(views[0] * views[1])

    def connection(streams, **options):
        return free.HyperConnections(streams, num_input_views=2, **options)

    run = probes.capture(built(connection, branch=Product), ids)
    trace = run["trace"].to_dataset()
    assert run.attrs["reconstruction_error"] < 1e-6
    assert trace.read.shape == (3, 2, 5, 2, 4)
    assert trace.write.shape == (3, 2, 5, 4, 1)
