"""Steps that add more than one branch at once: a solver's evaluations, couplings of halves, blocks with skips of their own."""

from __future__ import annotations

import torch
from torch import nn

from tests.models.designs import truth
from tests.models.designs.depth import DepthModel
from tests.models.designs.design import Design
from tests.models.designs.parts import BLOCKS, VOCABULARY, WIDTH, Attention, Mlp

HALVES, HALVES_APART = "b t (n d) -> b t n d", "b t n d -> b t n d"


class RungeKutta(DepthModel):
    """One function in a loop, evaluated four times a step (a neural ODE)."""

    def build(self):
        self.function = Mlp(norm=True)

    def trunk(self, x):
        for number in range(BLOCKS):
            first = self.function(x)
            second = self.function(x + 0.25 * first)
            third = self.function(x + 0.25 * second)
            fourth = self.function(x + 0.5 * third)
            x = x + 0.5 / 6 * (first + 2 * second + 2 * third + fourth)
            truth.state(x, number, need=f"step {number}")
        return x


class CoupledHalves(nn.Module):
    """Each half of the features is added to in turn, by what is computed of the other one (NICE)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 2 * WIDTH)
        self.blocks = nn.ModuleList(Mlp(norm=True) for _ in range(2 * BLOCKS))
        self.norm, self.head = nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, VOCABULARY)

    def forward(self, ids):
        x = self.embed(ids)
        truth.state(x, -1, "embed", axes=HALVES, n=2)
        halves = list(x.chunk(2, -1))
        for number, block in enumerate(self.blocks):
            changed = number % 2
            halves[changed] = halves[changed] + block(halves[1 - changed])
            truth.state(torch.cat(halves, -1), number, axes=HALVES, n=2)
        return self.head(self.norm(torch.cat(halves, -1)))


class FeatureAverages(DepthModel):
    """Each block reads an average over depth with a weight for each feature."""

    def build(self):
        self.layers = nn.ModuleList(Mlp(norm=True) for _ in range(BLOCKS))
        self.weights = nn.ParameterList(torch.rand(number + 1, WIDTH) for number in range(BLOCKS + 1))

    def trunk(self, x):
        outputs = [x]
        for number, layer in enumerate([*self.layers, None]):
            x = sum(w * y for w, y in zip(self.weights[number], outputs, strict=True))
            truth.state(x, number - 1, "post|pre", need=f"read {number}")
            if layer is not None:
                outputs.append(layer(x))
        return x


class ResidualBlock(nn.Module):
    """A block whose two skips are inside of it."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(norm=True), Mlp(norm=True)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


class StreamsOfHalves(nn.Module):
    """The streams are parts of one embedding; a block with skips of its own runs on one of them after all were mixed."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 2 * WIDTH)
        self.blocks = nn.ModuleList(ResidualBlock() for _ in range(BLOCKS))
        self.mix = nn.Parameter(torch.eye(2) + 0.2 * torch.randn(BLOCKS, 2, 2))
        self.gain = nn.Parameter(torch.rand(BLOCKS, 2) + 0.5)
        self.head = nn.Linear(2 * WIDTH, VOCABULARY)

    def forward(self, ids):
        x = torch.stack(self.embed(ids).chunk(2, -1), 2)
        truth.state(x, -1, "embed", axes=HALVES_APART)
        for number, block in enumerate(self.blocks):
            active = number % 2
            predicted = torch.einsum("oi,btid->btod", self.mix[number], x)
            change = block(x[:, :, active]) - predicted[:, :, active]
            x = predicted + self.gain[number][:, None] * change.unsqueeze(2)
            truth.state(x, number, axes=HALVES_APART)
        return self.head(x.flatten(2))


class GatedByCondition(nn.Module):
    """What branches read is scaled, and what they give, by a condition that is no state (DiT)."""

    def __init__(self):
        super().__init__()
        self.image, self.kind = nn.Conv2d(4, WIDTH, 2, 2), nn.Embedding(7, WIDTH)
        self.blocks = nn.ModuleList(GatedBlock() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, image, kind):
        x, condition = self.image(image).flatten(2).transpose(1, 2), self.kind(kind)
        truth.state(x, -1, "embed")
        for number, block in enumerate(self.blocks):
            x = block(x, condition)
            truth.state(x, number)
        return self.head(x)


class GatedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(), Mlp()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.gates = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x, condition):
        shift, scale, gate, other_shift, other_scale, other_gate = (
            self.gates(condition).unsqueeze(1).chunk(6, -1)
        )
        x = x + gate * self.attn(self.norm(x) * (1 + scale) + shift)
        truth.state(x, -1, "mid", need="")
        return x + other_gate * self.mlp(self.norm(x) * (1 + other_scale) + other_shift)


def noisy_images(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 6, 6, generator=generator), torch.randint(7, (3,), generator=generator)


STEP_DESIGNS = (
    Design("Runge-Kutta steps", RungeKutta, layers="function", labelled=False),
    Design(
        "averages over depth of each feature",
        FeatureAverages,
        layers="layers.{i}",
        branches_named=True,
        labelled=False,
        family="depth_history",
    ),
    Design(
        "coupled halves", CoupledHalves, family="streams|hc|independent_hc", streams=2, layout="B T (N D)"
    ),
    Design(
        "streams of halves, blocks with skips",
        StreamsOfHalves,
        family="hc|altup",
        streams=2,
        layout="B T N D",
    ),
    Design("gates by a condition", GatedByCondition, batch=noisy_images, labelled=False),
)
