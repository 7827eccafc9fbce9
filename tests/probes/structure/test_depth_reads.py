"""Are sums over depth read where they are, and models with constants or means in between read as what they are?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from depthscope import probes
from tests.models import stream_bugs
from tests.verdicts.networks import built
from tests.verdicts.plans import Plan

IDS = torch.randint(1, 48, (4, 12), generator=torch.Generator().manual_seed(0))


def captured(model: nn.Module):
    return probes.capture(model.eval(), {"input_ids": IDS})


def positions(kind: str, model: nn.Module) -> None:
    """Give a model of the zoo other positions than its own parameter, which is a constant of the forward."""
    model.places, model.norm_in = nn.Embedding(64, 32), nn.LayerNorm(32)
    of = {
        "of every sequence": lambda ids: model.places(torch.arange(ids.shape[1])),
        "of every token": lambda ids: model.places(torch.arange(ids.shape[1]).expand_as(ids)),
    }
    if kind == "before a norm":
        model.embedded = lambda ids: model.norm_in(model.embed(ids) + of["of every token"](ids))
    elif kind != "a parameter":
        model.embedded = lambda ids: model.embed(ids) + of[kind](ids)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("DenseFormer", "of every sequence"),
        ("DenseFormer", "before a norm"),
        ("attention residuals", "a parameter"),
        ("attention residuals", "of every token"),
    ],
)
def test_an_embedding_with_positions_is_one_source(family, kind):
    model = built(Plan(family=family, blocks=4))
    positions(kind, model)
    run = captured(model)
    assert run.attrs["proof"] == "proven"
    assert float(run["trace"]["reconstruction_error"].max()) < 1e-6
    assert "depth_read" in run["trace"]


def test_streams_that_each_block_opens_with_constants_are_unproven():
    model = built(Plan(family="mHC", blocks=4, streams=3, start="apart"))
    offsets = torch.randn(3, 32)
    model.first, model.last = (lambda x: x.mean(2)), (lambda x: x.unsqueeze(2))
    for block in model.blocks:
        block.before, block.after = (lambda x: x.unsqueeze(2) + offsets), (lambda x: x.mean(2))
    proof = captured(model).attrs["proof"]
    assert proof.startswith("unproven: 3 streams are expanded and merged inside each step")


def test_a_block_that_averages_tokens_leaves_the_chain_unproven_there():
    model = built(Plan(family="sandwich-norm transformer", blocks=5))
    model.blocks[2].after = lambda x: torch.lerp(x.mean(1, keepdim=True).expand_as(x), x, 1e-3)
    run = captured(model)
    assert run.attrs["proof"].startswith("unproven: from depth 3 to 4 the state is not carried on")
    assert run["trace"].layer.values.tolist() == [-1, 0, 1, 2, 2, 3, 4]
    assert run["trace"].site.values.tolist() == ["embed", "post", "post", "mid", "post", "post", "post"]


def test_a_block_that_gives_another_state_does_not_end_the_chain():
    model = built(Plan(blocks=4))
    u = nn.functional.normalize(torch.randn(32), dim=0)
    model.blocks[1].after = lambda x: (x @ u).unsqueeze(-1) * u
    run = captured(model)
    assert run.attrs["proof"] == "unproven: blocks.2 adds a branch after the last state that was found"
    assert list(run["trace"]["module"].values[1:]) == [f"blocks.{number}" for number in range(4)]


@pytest.mark.parametrize("style", stream_bugs.STYLES)
def test_coefficients_of_another_token_are_read(style):
    model = stream_bugs.network(stream_bugs.Wiring(style, "other_token"))
    assert probes.capture(model, stream_bugs.tokens(3)).attrs["proof"] == "proven"
