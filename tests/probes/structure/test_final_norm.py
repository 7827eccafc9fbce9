"""The norm after the last state is found by what it computes, and where no module shows it, that is the reason given."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from depthscope import probes

WIDTH = 24


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.net = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

    def forward(self, x):
        return x + self.net(self.norm(x))


class Plainly(nn.Module):
    """A norm whose class is not called one, written out."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain


class Divided(Plainly):
    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return self.gain * centred / (centred.std(-1, keepdim=True) + 1e-6)


class Gate(Plainly):
    """No norm: a product with a gate that the state makes."""

    def forward(self, x):
        return x * torch.sigmoid(x.mean(-1, keepdim=True)) * self.gain


class Model(nn.Module):
    def __init__(self, last, end):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.last, self.end = last(), end

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.end(self.last, x))


def norm() -> nn.Module:
    return nn.LayerNorm(WIDTH)


def straight(last, x):
    return last(x)


def coverage(last, end):
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(0))
    run = probes.capture(Model(last, end).eval(), ids)
    table = run["coverage"].to_dataset().to_dataframe().reset_index()
    (row,) = table[table["kind" if "kind" in table else "site"] == "final"].to_dict("records")
    return run, row


@pytest.mark.parametrize(
    ("last", "end"),
    [
        (norm, straight),
        (Plainly, straight),
        (Divided, straight),
        (norm, lambda last, x: last(0.5 * x)),
        (norm, lambda last, x: last(x.double().float())),
        (lambda: nn.ModuleList([norm()]), lambda last, x: last[0](x)),
        (norm, lambda last, x: last(x + torch.ones(WIDTH))),  # what is constant is no branch
    ],
)
def test_a_norm_of_any_name_is_the_final_one(last, end):
    run, row = coverage(last, end)
    assert row["why"] == ""
    assert run["trace"]["final"].dims == ("sample", "token", "feature")
    sizes = run["trace"]["final"].to_numpy()
    assert sizes.std() == pytest.approx(1.0, abs=0.05)
    assert row["module"].startswith("last")


@pytest.mark.parametrize(
    ("last", "end"),
    [
        (nn.Identity, lambda last, x: F.layer_norm(x, (WIDTH,))),
        (norm, lambda last, x: last(x[:, -1])),
        (norm, lambda last, x: last(x.flatten(0, 1)).view(x.shape)),
        (norm, lambda last, x: last(x.transpose(0, 1)).transpose(0, 1)),
    ],
)
def test_a_norm_that_shows_no_state_of_every_token_is_said_to_be_there(last, end):
    run, row = coverage(last, end)
    assert "final" not in run["trace"]
    assert row["why"].startswith("the last state is normalised in ")


@pytest.mark.parametrize(
    ("last", "end"),
    [(nn.Identity, straight), (Gate, straight), (norm, lambda last, x: last(x.mean(1)))],
)
def test_without_a_norm_of_the_state_there_is_none(last, end):
    _, row = coverage(last, end)
    assert row["why"] == "no norm takes the last state"
