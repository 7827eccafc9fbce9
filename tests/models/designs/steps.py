"""Streams whose steps are written in other ways, and branches that a condition gates."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tests.models.designs import truth
from tests.models.designs.design import Design
from tests.models.designs.parts import BLOCKS, STREAMS, WIDTH, Attention, Mlp
from tests.models.designs.styles import Mixed, StreamBase

APART = "b t n d -> b t n d"


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
        truth.state(torch.stack(streams, 2), -1, "embed", axes=APART)
        for row, branch in enumerate(self.branches):
            out = branch(sum(weight * stream for weight, stream in zip(self.pre[row], streams, strict=True)))
            streams = [sum(w * x for w, x in zip(weights, streams, strict=True)) for weights in self.res[row]]
            streams[0], streams[-1] = streams[0] + out, streams[-1] - out
            post = torch.tensor([1.0, 0.0, 0.0, -1.0])
            truth.connection(h_res=self.res[row], h_pre=self.pre[row], h_post=post)
            truth.state(torch.stack(streams, 2), row, axes=APART)
        return self.head(self.norm(sum(streams)))


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
            truth.state(x, row, axes=APART)
        return self.head(self.norm(x.sum(2)))


STEP_DESIGNS = (
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
)
