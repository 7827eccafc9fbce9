"""Are all towers of a model in its run? Each is read, or named with the reason why it is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import T5Config, T5Model

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


class PictureAndText(nn.Module):
    """Two towers that are compared, one of which begins with a class token next to patches."""

    def __init__(self):
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.visual, self.text = Tower(4, WIDTH), Tower(3, WIDTH)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, picture, text):
        patches = self.patch(picture).flatten(2).transpose(1, 2)
        seen = self.visual(torch.cat([self.token.expand(len(picture), -1, -1), patches], 1))[:, 0]
        said = self.text(self.embedding(text))[:, -1]
        return seen @ said.T


def test_a_tower_that_begins_with_a_class_token_is_read():
    torch.manual_seed(0)
    batch = {"picture": torch.randn(2, 3, 8, 8), "text": tokens(2, 6) % VOCABULARY}
    found = probes.describe(PictureAndText(), batch)
    assert found.chains == {"visual": 5, "text": 4}
    assert (found.proof, found.not_covered) == ("proven", ())


class Forecast(nn.Module):
    """An encoder and a decoder of a series that is scaled at first and back at last; one operation writes into a view."""

    def __init__(self):
        super().__init__()
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 3, "vocab_size": 2}
        self.t5 = T5Model(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))
        self.patch, self.head = nn.Linear(4, 32), nn.Linear(32, 24)

    def forward(self, series):
        mean = series.nanmean(1, keepdim=True).nan_to_num(0.0)
        scale = (series - mean).square().nanmean(1, keepdim=True).sqrt().nan_to_num(1.0)
        steps = torch.zeros(len(series), series.shape[1] + 1)
        torch.cumsum(torch.ones_like(series), 1, out=steps.narrow(1, 1, series.shape[1]))
        patches = self.patch(((series - mean) / scale + steps[:, 1:] / 100).unflatten(1, (-1, 4)))
        start = torch.zeros(len(series), 1, dtype=torch.long)
        said = self.t5(inputs_embeds=patches, decoder_input_ids=start).last_hidden_state
        return (self.head(said).view(len(series), -1) * scale + mean).view(len(series), 3, 8)


def test_a_mean_that_the_whole_output_is_shifted_by_is_no_stream():
    torch.manual_seed(0)
    found = probes.describe(Forecast().eval(), torch.randn(2, 24))
    assert (found.chains, found.proof) == ({"encoder": 4, "decoder": 4}, "proven")
