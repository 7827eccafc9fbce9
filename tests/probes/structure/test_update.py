"""Is a description right about what each next state of one stream is, where norms, activations and scales are in between?"""

import pytest
import torch
from torch import nn

from depthscope import capture, describe

WIDTH = 16


class Block(nn.Module):
    """A branch, and what a block of some kind makes of it."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.norm = kind, nn.LayerNorm(WIDTH)
        self.branch = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        if self.kind == "norm first":  # of the state itself, which goes on
            x = self.norm(x)
            return x + self.branch(x)
        if self.kind == "gate":
            gate = torch.sigmoid(x)
            return gate * self.branch(x) + (1 - gate) * x
        scale = 1.7 if "scaled" in self.kind else 1.0
        total = scale * x + self.branch(x)
        if "norm" in self.kind:
            return self.norm(total)
        return torch.relu(total) if "relu" in self.kind else total


@pytest.mark.parametrize(
    ("kind", "update", "after"),
    [
        ("plain", "the one before plus what was computed from it", ""),
        ("scaled", "the one before, times 1.7, plus what was computed from it", ""),
        ("norm", "the one before plus what was computed from it, followed by a norm", "norm"),
        (
            "scaled norm",
            "the one before, times 1.7, plus what was computed from it, followed by a norm",
            "norm",
        ),
        ("relu", "the one before plus what was computed from it, followed by an activation", "activation"),
        ("norm first", "the one before after a norm plus what was computed from it", ""),
        ("gate", "the one before, scaled at each token, plus what was computed from it", ""),
    ],
)
def test_what_each_next_state_is(kind, update, after):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, WIDTH), *(Block(kind) for _ in range(4)), nn.Linear(WIDTH, 20))
    ids = torch.randint(0, 20, (2, 6))
    assert describe(model, ids).update == f"each next state is {update}, as traced in a forward"
    trace = capture(model, ids, sites=["embed", "post", "branch_out"])["trace"]
    said = trace["after_sum"].values.tolist() if "after_sum" in trace else [""] * 4
    assert said == [after] * 4
    if kind == "norm first":  # no factors give norm(X) + F, and that is said
        assert all(of.startswith("unproven") for of in trace["proof"].values.tolist())
