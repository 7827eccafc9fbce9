"""A function of autograd makes a state and reads it itself: autograd has a part of its gradient, and none is given."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from depthscope import probes


class AddSine(torch.autograd.Function):
    """The sum of two tensors and its sine in one function, as fused kernels have a sum and its norm."""

    @staticmethod
    def forward(ctx, x, state):
        total = x + state
        ctx.save_for_backward(total)
        return total.sin(), total

    @staticmethod
    def backward(ctx, of_sine, of_total):
        (total,) = ctx.saved_tensors
        return (of_sine * total.cos() + of_total,) * 2


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.mixers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, ids):
        state = self.embed(ids)
        x = state.sin()
        for mixer in self.mixers:
            x, state = AddSine.apply(torch.tanh(mixer(x)), state)
        return self.head(x)


def test_no_gradient_is_given_of_a_state_that_a_function_of_autograd_reads_itself():
    ids = torch.randint(0, 20, (3, 5))
    run = probes.capture(Fused(), ids, loss=lambda output, _: output.square().mean(), gradients=True)

    assert run["trace"].attrs["proof"] == "proven"
    assert not np.isnan(run["trace"]["gradient"][0]).any()
    assert np.isnan(run["trace"]["gradient"][1:]).all()
    assert any("states 1, 2, 3, 4: a function of autograd" in of["why"] for of in run.attrs["not_covered"])
