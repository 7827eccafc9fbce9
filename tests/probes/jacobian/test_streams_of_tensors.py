"""Jacobians of models whose streams are tensors of their own, against autograd from streams that are put in by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.functional import jvp, vjp

from depthscope.probes.jacobian import block_jacobians, jacobian
from depthscope.probes.jacobian.differentiable_forward import JacobianError, is_mixed
from depthscope.probes.reading.recorder import GraphRecorder
from tests.probes.session.test_streams_of_tensors import BLOCKS, STREAMS, WIDTH, ListOfStreams

IDS = torch.randint(0, 30, (1, 3), generator=torch.Generator().manual_seed(0))
SIZE = 3 * STREAMS * WIDTH
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Routed(ListOfStreams):
    """The same with coefficients that are computed from the streams, or constants that are put in."""

    def __init__(self):
        super().__init__("scaled")
        torch.manual_seed(1)
        self.routers = nn.ModuleList(
            nn.Linear(STREAMS * WIDTH, STREAMS * (STREAMS + 2)) for _ in range(BLOCKS)
        )
        self.constant: list[tuple[torch.Tensor, ...]] | None = None
        self.weights: list[tuple[torch.Tensor, ...]] = []

    def coefficients(self, number, streams):
        if self.constant is not None:
            return self.constant[number]
        raw = self.routers[number](torch.cat(streams, -1)).unflatten(-1, (STREAMS, STREAMS + 2))
        return raw[..., :STREAMS].softmax(-1), raw[..., -2].sigmoid(), 2 * raw[..., -1].sigmoid()

    def forward(self, ids):
        streams = self.replaced_first(self.start(self.embed(ids), self.scale))
        for number, block in enumerate(self.blocks):
            res, pre, post = self.coefficients(number, streams)
            self.weights.append((res.detach(), pre.detach(), post.detach()))
            out = block(sum(pre[..., n, None] * x for n, x in enumerate(streams)))
            streams = self.replaced(
                [
                    sum(res[..., m, n, None] * x for n, x in enumerate(streams)) + post[..., m, None] * out
                    for m in range(STREAMS)
                ]
            )
            self.states.append(streams)
        return self.head(sum(streams))

    def replaced_first(self, streams):
        self.states, self.weights = [], []
        streams = self.replaced(streams)
        self.states.append(streams)
        return streams


def require_same(found, model, start, stop):
    """Products with J and Jᵀ are those of the model's own code between two states, by token, stream and feature."""
    model(IDS)

    def run(x):
        model.put_in = {(start, n): stream for n, stream in enumerate(x.unbind(2))}
        model(IDS)
        return torch.stack(model.states[stop], 2)

    x = torch.stack(model.states[start], 2).detach()
    v, u = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.matvec(v), jvp(run, x, v.view_as(x))[1].flatten(), **CLOSE)
    torch.testing.assert_close(found.rmatvec(u), vjp(run, x, u.view_as(x))[1].flatten(), **CLOSE)
    model.put_in = {}


@pytest.mark.parametrize("make", [lambda: ListOfStreams("copies"), Routed], ids=["static", "dynamic"])
@pytest.mark.parametrize(("start", "stop"), [(0, 3), (1, 3)])
def test_the_whole_derivative_is_that_of_autograd(make, start, stop):
    model = make()
    require_same(jacobian(model, IDS, start=start, stop=stop, tokens="all"), model, start, stop)


def test_frozen_routing_is_the_model_with_its_coefficients_put_in():
    model = Routed()
    found = jacobian(model, IDS, routing="frozen", tokens="all")
    steps = block_jacobians(model, IDS, routing="frozen", tokens="all")
    with pytest.raises(AssertionError):
        require_same(found, model, 0, 3)
    model.constant = model.weights[:]
    require_same(found, model, 0, 3)
    for number, step in enumerate(steps):
        require_same(step, model, number, number + 1)


def test_blocks_one_after_another():
    model = Routed()
    for number, step in enumerate(block_jacobians(model, IDS, tokens="all")):
        require_same(step, model, number, number + 1)


def test_streams_of_which_one_is_computed_from_another_are_told():
    """A gradient at the first one would come through the second one, too."""
    recorder = GraphRecorder(nn.Identity(), ())
    with recorder:
        first = torch.ones(2, 3) * 2
        second, third = first + 1, torch.ones(2, 3) + 1
    assert is_mixed(recorder, [first, second])
    assert not is_mixed(recorder, [first, third])


def test_one_tensor_that_is_every_stream_and_an_early_read_are_refused():
    with pytest.raises(JacobianError, match="several streams at once"):
        jacobian(ListOfStreams("one tensor"), IDS, start=0)
    model = ListOfStreams("one tensor")
    found = jacobian(model, IDS, tokens="all")
    assert found.start == 1
    require_same(found, model, 1, 3)
    with pytest.raises(JacobianError, match="read before the others are made"):
        jacobian(ListOfStreams("copies", reads_early=True), IDS, start=1)
