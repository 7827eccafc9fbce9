"""Are all towers of a model in its run? Each is read, or named with the reason why it is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from depthscope import probes
from depthscope.diagnostics import schema
from tests.models.verdict_models import WIDTH, Constrained, random_logits, streams, tokens

VOCABULARY = 50


class Feedforward(nn.Module):
    """x + F(x), along the last axis."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Tower(nn.Module):
    """Some blocks one after another."""

    def __init__(self, blocks: int, width: int):
        super().__init__()
        self.blocks = nn.ModuleList(Feedforward(width) for _ in range(blocks))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class TextAndSound(nn.Module):
    """A large tower for text and a small one for sound."""

    def __init__(self, text: nn.Module, sound: nn.Module, width: int):
        super().__init__()
        self.embedding, self.text, self.sound = nn.Embedding(VOCABULARY, WIDTH), text, sound
        self.projection = nn.Linear(width, WIDTH)

    def forward(self, text, sound):
        return self.text(self.embedding(text)).mean(1) + self.projection(self.sound(sound)).mean(1)


def text_and_sound(width: int = 4) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = TextAndSound(Tower(5, WIDTH), Tower(2, width), width)
    return model, {"text": tokens(3, 11) % VOCABULARY, "sound": torch.randn(3, 7, width)}


def test_a_tower_that_is_left_out_is_named_and_can_be_read_as_its_hint_says():
    model, batch = text_and_sound()
    found = probes.describe(model, batch)
    assert found.chains == {"": 6}
    assert found.proof == "proven"
    (part,) = found.not_covered
    assert (part["module"], part["blocks"], part["block"]) == ("sound", 2, "Feedforward")
    assert part["share"] == pytest.approx(
        sum(p.numel() for p in model.sound.parameters())
        / sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
    )
    assert "not covered  sound (2 blocks of Feedforward" in str(found)
    alone = probes.capture(model, batch, layers=part["layers"])
    assert alone["trace"].sizes["depth"] == 3
    assert [other["module"] for other in alone.attrs["not_covered"]] == ["text"]


def test_towers_of_one_size_are_all_read_and_nothing_is_left_out():
    model, batch = text_and_sound(WIDTH)
    run = probes.capture(model, batch)
    assert {name: run["trace"][name].sizes["depth"] for name in schema.chains(run)} == {"text": 6, "sound": 3}
    assert "not_covered" not in run.attrs


def test_a_tower_next_to_streams_is_named():
    text = streams(random_logits(0.3), make=Constrained)
    model = nn.Module()
    model.text, model.sound = text, Tower(3, WIDTH)
    model.forward = lambda ids, sound: (
        model.text(ids).mean(1) + model.sound(sound).mean((1, 2), keepdim=True)[:, 0]
    )
    run = probes.capture(model, {"ids": tokens(3, 11), "sound": torch.randn(3, 7, WIDTH)})
    assert run.attrs["n_streams"] > 1
    (part,) = run.attrs["not_covered"]
    assert part["module"] == "sound"
    assert "the chain that has them is read alone" in part["why"]


class Heads(nn.Module):
    """A trunk, and from its middle a head of the same blocks."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.ModuleList(Feedforward(WIDTH) for _ in range(4))
        self.head = nn.ModuleList(Feedforward(WIDTH) for _ in range(2))

    def forward(self, x):
        x = self.trunk[1](self.trunk[0](x))
        early = self.head[1](self.head[0](x))
        return self.trunk[3](self.trunk[2](x)) + early


def test_a_head_of_the_same_blocks_leaves_the_trunk_unproven_until_its_blocks_are_named():
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(3, 7, WIDTH)
    assert "lie in lanes side by side" in probes.capture(model, x).attrs["proof"]
    trace = probes.capture(model, x, layers="trunk").trace
    assert [str(m) for m in trace.module.values] == ["(input)", "trunk.0", "trunk.1", "trunk.2", "trunk.3"]
