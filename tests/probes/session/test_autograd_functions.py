"""A function of autograd makes a state and reads it itself: autograd has a part of its gradient, and none is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from depthscope import probes

WIDTH = 8
IDS = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(0))
EPS = 1e-6


def normed(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


class AddNorm(torch.autograd.Function):
    """The sum of two tensors and its norm in one function, as fused kernels have it."""

    @staticmethod
    def forward(ctx, x, state, weight):
        total = x + state
        ctx.save_for_backward(total, weight)
        return normed(total, weight), total

    @staticmethod
    def backward(ctx, of_normed, of_total):
        total, weight = (of.detach().requires_grad_() for of in ctx.saved_tensors)
        with torch.enable_grad():
            given = torch.autograd.grad(normed(total, weight), (total, weight), of_normed)
        return given[0] + of_total, given[0] + of_total, given[1]


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(20, WIDTH)
        self.mixers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.weights = nn.ParameterList(nn.Parameter(torch.rand(WIDTH) + 0.5) for _ in range(5))
        self.head = nn.Linear(WIDTH, 20)

    def forward(self, ids):
        state = self.embed(ids)
        x = normed(state, self.weights[0])
        for mixer, weight in zip(self.mixers, self.weights[1:], strict=True):
            x, state = AddNorm.apply(torch.tanh(mixer(x)), state, weight)
        return self.head(x)


def loss(output, batch):
    return F.cross_entropy(output.flatten(0, 1), batch.flatten())


@pytest.mark.parametrize("gradients", [True, False])
def test_no_gradient_is_given_of_a_state_that_a_function_of_autograd_reads_itself(gradients):
    run = probes.capture(Fused(), IDS, loss=loss, gradients=gradients)

    assert run["trace"].attrs["proof"] == "proven"
    if gradients:
        assert not np.isnan(run["trace"]["gradient"][0]).any()
        assert np.isnan(run["trace"]["gradient"][1:]).all()
    said = " ".join(each["why"] for each in run.attrs.get("not_covered", []))
    assert ("no gradients of the states 1, 2, 3, 4: a function of autograd" in said) == gradients
