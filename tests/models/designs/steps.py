"""Steps that add more than one branch at once: a solver's evaluations, couplings of halves, blocks with skips of their own."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tests.models.designs import truth
from tests.models.designs.depth import DepthModel
from tests.models.designs.design import Design
from tests.models.designs.parts import BLOCKS, STREAMS, VOCABULARY, WIDTH, Attention, Mlp, normal
from tests.models.designs.styles import Mixed, StreamBase

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


def mixed_by_convolutions(model, row, branch, x):
    """Streams are the channels of convolutions with kernels of one element."""
    x = x.transpose(1, 2)
    read = functional.conv2d(x, model.pre[row][None, :, None, None])
    out = branch(read[:, 0])
    written = functional.conv2d(out[:, None], model.post[row][:, None, None, None])
    return (functional.conv2d(x, model.res[row][:, :, None, None]) + written).transpose(1, 2), {}


class WrittenLast(StreamBase):
    """Streams in a list, mixed one by one; the branch is added to the first and the last of them after all were mixed."""

    def forward(self, ids):
        x = self.embed(ids)
        streams = [x * scale for scale in (1.5, 0.5, -1.0, 2.0)]
        truth.state(torch.stack(streams, 2), -1, "embed", axes=HALVES_APART)
        for row, branch in enumerate(self.branches):
            out = branch(sum(weight * stream for weight, stream in zip(self.pre[row], streams, strict=True)))
            streams = [sum(w * x for w, x in zip(weights, streams, strict=True)) for weights in self.res[row]]
            streams[0], streams[-1] = streams[0] + out, streams[-1] - out
            post = torch.tensor([1.0, 0.0, 0.0, -1.0])
            truth.connection(h_res=self.res[row], h_pre=self.pre[row], h_post=post)
            truth.state(torch.stack(streams, 2), row, axes=HALVES_APART)
        return self.head(self.norm(sum(streams)))


class FoldedImages(nn.Module):
    """Streams lie in the batch of images, whose rows are as many as the sequences; a convolution makes the first state."""

    def __init__(self):
        super().__init__()
        self.stem, self.shrink = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, WIDTH, 2, 2)
        self.blocks = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(BLOCKS))
        self.mix = nn.Parameter(torch.eye(2) + 0.2 * torch.randn(BLOCKS, 2, 2))
        self.pre, self.post = nn.Parameter(torch.rand(BLOCKS, 2)), nn.Parameter(torch.rand(BLOCKS, 2))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, image):
        axes = "(b n) d h w -> b (h w) n d"
        x = self.shrink(self.stem(image).repeat_interleave(2, 0))
        truth.state(x, -1, "embed", axes=axes, n=2)
        for number, block in enumerate(self.blocks):
            x = x.unflatten(0, (-1, 2))
            out = block(torch.einsum("n,bndhw->bdhw", self.pre[number], x).tanh())
            x = torch.einsum("oi,bidhw->bodhw", self.mix[number], x) + torch.einsum(
                "n,bdhw->bndhw", self.post[number], out
            )
            x = x.flatten(0, 1)
            truth.connection(h_res=self.mix[number], h_pre=self.pre[number], h_post=self.post[number])
            truth.state(x, number, axes=axes, n=2)
        return self.head(x.mean((-1, -2)).unflatten(0, (-1, 2)).sum(1))


class ChannelHalves(nn.Module):
    """Each half of the channels is added to in turn, and both are joined again (RevNet)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(2, WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1))
            for _ in range(2 * BLOCKS)
        )
        self.head = nn.Linear(2 * WIDTH, 5)

    def forward(self, image):
        axes = "b (n d) h w -> b (h w) n d"
        x = self.stem(image)
        truth.state(x, -1, "embed", axes=axes, n=2)
        for number, block in enumerate(self.blocks):
            halves = list(x.chunk(2, 1))
            halves[number % 2] = halves[number % 2] + block(halves[1 - number % 2])
            x = torch.cat(halves, 1)
            truth.state(x, number, axes=axes, n=2)
        return self.head(x.mean((-1, -2)))


class ConditionTower(nn.Module):
    """A second tower begins with the first state and a condition; layers add its states to the first one (ControlNet)."""

    def __init__(self):
        super().__init__()
        self.embed, self.condition = nn.Linear(4, WIDTH), nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList(Mlp(norm=True) for _ in range(BLOCKS))
        self.control = nn.ModuleList(Mlp(norm=True) for _ in range(2))
        self.outputs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x, condition):
        x = self.embed(x)
        truth.state(x, -1, "embed")
        control = x + self.condition(condition)
        truth.state(control, 0, "embed|pre|mid|post", need="condition")
        for number, block in enumerate(self.blocks):
            x = x + block(x)
            if number < len(self.control):
                truth.state(x, number, "mid|post", need="")
                control = control + self.control[number](control)
                truth.state(control, number, "mid|post", need=f"control {number}")
                x = x + self.outputs[number](control)
            truth.state(x, number, "post|pre", need=f"block {number}")
        return self.head(x)


def two_inputs(seed):
    return normal(seed, 2, 7, 4), normal(seed + 1, 2, 7, 6)


class CoarseBranches(StreamBase):
    """Branches run, and are weighed, in bfloat16; the streams are float32."""

    def forward(self, ids):
        x = self.begin(ids)
        for row, branch in enumerate(self.branches):
            read = torch.einsum("n,btnd->btd", self.pre[row], x).bfloat16()
            weight = self.post[row].bfloat16()
            added = (branch.bfloat16()(read)[:, :, None] * weight[:, None]).float()
            truth.connection(h_res=self.res[row], h_pre=self.pre[row], h_post=weight.float())
            x = self.res[row] @ x + added
            truth.state(x, row, axes=HALVES_APART)
        return self.head(self.norm(x.sum(2)))


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
    *(
        Design(
            name,
            make,
            streams=STREAMS,
            layers="branches.{i}",
            branches_named=True,
            layout=layout,
            family="hc|mhc",
            rounding=rounding,
        )
        for name, make, layout, rounding in (
            ("streams are channels of convolutions", partial(Mixed, mixed_by_convolutions), "B T N D", 1e-5),
            ("streams in a list, written to last", WrittenLast, "N B T D", 1e-5),
            ("branches and their weights in bfloat16", CoarseBranches, "B T N D", 1e-2),
        )
    ),
    Design(
        "streams in the batch of images, as many rows as sequences",
        FoldedImages,
        batch=lambda seed: normal(seed, 3, 3, 6, 6),
        family="hc",
        streams=2,
        layout="(B N) D H W",
    ),
    Design(
        "coupled halves of the channels",
        ChannelHalves,
        batch=lambda seed: normal(seed, 2, 3, 5, 5),
        family="streams|hc|independent_hc",
        streams=2,
        layout="B (N D) H W",
    ),
    Design(
        "a tower that begins with a state and a condition",
        ConditionTower,
        batch=two_inputs,
        family="residual|depth_history",
        labelled=False,
    ),
)
