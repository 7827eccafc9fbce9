"""Derivatives along the scale of what modules give, and the steps that follow them: against differences and known factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from depthscope.probes.rescaling import Scales, _derivatives, rescaled, sure

torch.set_num_threads(1)


class Sum(nn.Module):
    """x + a(x), then a head; ``factor``: of what a gives."""

    def __init__(self, factor: float = 1.0):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.head, self.factor = nn.Linear(6, 6), nn.Linear(6, 3), factor

    def forward(self, x):
        return self.head(x + self.factor * self.a(x).tanh())


def regression(factor: float = 1.0, sequences: int = 32):
    """A network that is exactly right, or would be with another factor, and its loss."""
    x = torch.randn(sequences, 5, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = Sum()(x) + 0.1 * torch.randn(sequences, 5, 3, generator=torch.Generator().manual_seed(2))
    rows = {
        20: slice(20),
        12: slice(20, None),
        sequences: slice(None),
    }  # of the parts of a batch, by their sizes
    return Sum(factor), x, lambda output, part: functional.mse_loss(output, y[rows[len(part)]])


def test_the_derivative_is_that_of_a_factor():
    model, x, loss = regression(2.0)
    of_parts = sure(_derivatives(model, [x[:20], x[20:]], loss, {})[1])
    slopes = sure(_derivatives(model, [x], loss, {})[1])
    step = 1e-2
    for path in ("a", "head"):
        high, low = (_derivatives(model, [x], loss, {path: by})[0] for by in (step, -step))
        assert slopes[path] == pytest.approx((high - low) / (2 * step), rel=1e-2)
        assert of_parts[path] == pytest.approx(slopes[path], rel=1e-5)


def test_steps_find_the_factor_that_was_planted_and_leave_the_model_as_it_was():
    model, x, loss = regression(3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = rescaled(model, [x[:20], x[20:]], loss, reach=0.1)
    assert found["loss"] == pytest.approx(float(loss(model(x), x).detach()))
    right, _, _ = regression()
    assert found["rescaled"] < 0.5 * found["loss"]
    assert (
        float(loss(right(x), x).detach()) < found["rescaled"]
    )  # tanh(a) and the head do not have the same factor
    # Of each sequence the way to that loss is known, and with it how sure it is.
    assert 0.0 < found["half_width"] < 0.3 * (found["loss"] - found["rescaled"])
    named = dict(found["most"])
    assert named["a"] < 1.0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_network_at_its_minimum_is_left_after_one_forward():
    model, x, loss = regression()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert rescaled(model, [x], loss, reach=1.0) == {}
    assert len(calls) == 1


def test_what_is_rewritten_or_has_no_axis_of_sequences_says_nothing():
    scales = Scales(4)
    tensor = torch.ones(8, 3)
    scales.add("rewritten", tensor, tensor._version - 1, torch.ones(8, 3))
    scales.add("of seven tokens", torch.ones(7, 3), 0, torch.ones(7, 3))
    assert scales.of_sequences == {}
    scales.add("flat", tensor, tensor._version, torch.ones(8, 3))
    assert scales.of_sequences["flat"].tolist() == [6.0] * 4
