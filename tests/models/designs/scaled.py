"""Plain networks whose state or branches are scaled: by constants, learned numbers, gates of features, or norms."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.models.designs import truth
from tests.models.designs.design import Design
from tests.models.designs.parts import BLOCKS, WIDTH, Attention, Mlp
from tests.models.designs.plain_blocks import Decoder, PreNorm


class LayerScaleBlock(PreNorm):
    def __init__(self, layer: int):
        super().__init__(layer)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.randn(WIDTH)) for _ in range(2))

    def forward(self, x):
        rows = ((self.attn, self.norm1, self.gamma1, "mid"), (self.mlp, self.norm2, self.gamma2, "post"))
        for branch, norm, gamma, site in rows:
            added = branch(norm(x))
            truth.connection(residual_scale=1, branch_gate=gamma, branch_out=added)
            x = x + gamma * added
            truth.state(x, self.layer, site)
        return x


class LayerScale(Decoder):
    """Each branch has a learned factor a feature (arXiv 2103.17239)."""

    block = LayerScaleBlock


class HighwayBlock(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.gate, self.mlp = nn.Linear(WIDTH, WIDTH), Mlp(norm=True)

    def forward(self, x):
        open_ = torch.sigmoid(self.gate(x))
        added = self.mlp(x)
        truth.connection(residual_gate=1 - open_, branch_gate=open_, branch_out=added)
        x = open_ * added + (1 - open_) * x
        truth.state(x, self.layer)
        return x


class Highway(Decoder):
    """A gate a feature shares out between the state and the branch (arXiv 1505.00387)."""

    block = HighwayBlock


class ScalarGateBlock(HighwayBlock):
    def __init__(self, layer: int):
        super().__init__(layer)
        self.gate = nn.Linear(WIDTH, 1)

    def forward(self, x):
        keep = torch.sigmoid(self.gate(x))
        added = self.mlp(x)
        truth.connection(residual_scale=keep[..., 0], branch_scale=1 - keep[..., 0], branch_out=added)
        x = torch.addcmul(keep * x, 1 - keep, added)
        truth.state(x, self.layer)
        return x


class ScalarGate(Decoder):
    """One gate a token."""

    block = ScalarGateBlock


class DeepNormBlock(PreNorm):
    def forward(self, x):
        for branch, norm, site in ((self.attn, self.norm1, "mid"), (self.mlp, self.norm2, "post")):
            # (2 N)^(1/4) of a decoder with N blocks
            x = norm((2 * BLOCKS) ** 0.25 * x + branch(x))
            truth.state(x, self.layer, site)
        return x


class DeepNorm(Decoder):
    """Post-norm with a larger state (arXiv 2203.00555)."""

    block = DeepNormBlock


class SphereBlock(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.attn, self.mlp = Attention(), Mlp()
        self.alpha = nn.Parameter(torch.rand(2, WIDTH))

    def forward(self, h):
        for number, (branch, site) in enumerate(((self.attn, "mid"), (self.mlp, "post"))):
            target = functional.normalize(branch(h), dim=-1)
            h = functional.normalize(h + self.alpha[number].abs() * (target - h), dim=-1)
            truth.state(h, self.layer, site)
        return h


class Sphere(Decoder):
    """nGPT: a step on the sphere (arXiv 2410.01131)."""

    block = SphereBlock


class AlphaBlock(PreNorm):
    def forward(self, x):
        for branch, norm, site in ((self.attn, self.norm1, "mid"), (self.mlp, self.norm2, "post")):
            added = branch(norm(x))
            truth.connection(residual_scale=0.8, branch_scale=0.6, branch_out=added)
            x = torch.add(0.8 * x, added, alpha=0.6)
            truth.state(x, self.layer, site)
        return x


class WeightedSum(Decoder):
    """a X + b F with constants whose squares add up to one, as in StyleGAN-like residuals."""

    block = AlphaBlock


class HalvedBetween(Decoder):
    """The state is halved between the blocks, outside of any module."""

    def walk(self, x):
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number + 1 < len(self.blocks):
                truth.connection(residual_scale=0.5)
                x = x * 0.5
                truth.state(x, number, "pre|post", need=f"layer {number}")
        return x


class FactorBlock(nn.Module):
    """Nothing but a factor of the state."""

    def __init__(self, layer: int, factor: float):
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, x):
        truth.connection(residual_scale=self.factor)
        x = self.factor * x
        truth.state(x, self.layer)
        return x


class HalvingBlock(Decoder):
    """One of the blocks halves the state, and adds nothing to it."""

    factor = 0.5

    def __init__(self):
        super().__init__(4)
        self.blocks[2] = FactorBlock(2, self.factor)


class InterpolatedBlock(PreNorm):
    def inner(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def forward(self, x):
        added = self.inner(x) - x
        truth.connection(residual_scale=1, branch_scale=0.003, branch_out=added)
        x = x + 0.003 * added
        truth.state(x, self.layer)
        return x


class Interpolated(Decoder):
    """A block with a residual of its own, of which a constant share is taken."""

    block = InterpolatedBlock


class PositionsBetween(Decoder):
    """A learned vector is added to the state between the blocks."""

    def __init__(self):
        super().__init__()
        self.steps = nn.Parameter(torch.randn(BLOCKS, WIDTH))

    def walk(self, x):
        for number, block in enumerate(self.blocks):
            x = x + self.steps[number]
            truth.state(x, number - 1, "pre|post|embed", need=f"layer {number - 1}")
            x = block(x)
        return x


class ZayaBlock(PreNorm):
    def __init__(self, layer: int):
        super().__init__(layer)
        self.scales, self.shifts = (nn.ParameterList(torch.randn(WIDTH) for _ in range(4)) for _ in range(2))

    def forward(self, x):
        for number, (branch, norm, site) in enumerate(
            ((self.attn, self.norm1, "mid"), (self.mlp, self.norm2, "post"))
        ):
            added = branch(norm(x))
            keep, write = self.scales[2 * number], self.scales[2 * number + 1]
            x = (x * keep + self.shifts[2 * number]) + (added * write + self.shifts[2 * number + 1])
            truth.state(x, self.layer, site)
        return x


class Zaya(Decoder):
    """Scale and shift a feature for state and branch alike (Zaya): affine, not linear."""

    block = ZayaBlock


class LaurelBlock(PreNorm):
    def __init__(self, layer: int):
        super().__init__(layer)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)
        self.alpha = nn.Parameter(torch.tensor([1.3, 0.6]))

    def forward(self, x):
        # The low-rank part may be called a branch or a part of the skip: only the states are written down.
        x = self.alpha[0] * (self.attn(self.norm1(x)) + self.mlp(self.norm2(x))) + self.alpha[1] * (
            x + self.up(self.down(x))
        )
        truth.state(x, self.layer)
        return x


class Laurel(Decoder):
    """Learned augmented residual with a low-rank map of the state (arXiv 2411.07501)."""

    block = LaurelBlock


SCALED_DESIGNS = (
    Design("LayerScale", LayerScale),
    Design("highway", Highway, family="highway"),
    Design("one gate a token, by addcmul", ScalarGate, family="highway"),
    Design("DeepNorm", DeepNorm),
    Design("nGPT", Sphere, family="residual|unproven"),
    Design("constant factors of state and branch", WeightedSum),
    Design("state halved between blocks", HalvedBetween),
    Design("a block halves the state", HalvingBlock),
    Design("a share of a block with a residual of its own", Interpolated),
    Design("vector added between blocks", PositionsBetween),
    Design("scale and shift of state and branch", Zaya),
    Design("LAuReL", Laurel),
)
