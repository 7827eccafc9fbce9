"""Convolutional residual networks: axes in other places, widths that change, skips over many blocks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.models.designs import truth
from tests.models.designs.design import Design
from tests.models.designs.parts import WIDTH, normal

CHANNELS_FIRST, IMAGE = "b d t -> b t 1 d", "b d h w -> b (h w) 1 d"


class ResidualUnit(nn.Module):
    """Two convolutions over time, as in codecs."""

    def __init__(self, layer: int, width: int):
        super().__init__()
        self.layer = layer
        self.conv1 = nn.Conv1d(width, width, 3, padding=1 + layer, dilation=1 + layer)
        self.conv2 = nn.Conv1d(width, width, 1)

    def forward(self, x):
        x = x + self.conv2(functional.elu(self.conv1(functional.elu(x))))
        truth.state(x, self.layer, axes=CHANNELS_FIRST)
        return x


class Codec(nn.Module):
    """A chain over (B, D, T)."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.stem = nn.Conv1d(1, width, 5, padding=2)
        self.units = nn.ModuleList(ResidualUnit(layer, width) for layer in range(3))
        self.head = nn.Conv1d(width, 1, 3, padding=1)

    def forward(self, wave):
        x = self.stem(wave)
        truth.state(x, -1, "embed", axes=CHANNELS_FIRST)
        for unit in self.units:
            x = unit(x)
        return self.head(x)


def wave(seed: int, length: int = 40) -> torch.Tensor:
    return normal(seed, 3, 1, length)


def wave_as_long_as_wide(seed: int) -> torch.Tensor:
    return wave(seed, WIDTH)


class BasicBlock(nn.Module):
    def __init__(self, layer: int, width: int, stride: int, below: int):
        super().__init__()
        self.layer = layer
        self.conv1 = nn.Conv2d(below, width, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(below, width, 1, stride) if stride > 1 else None

    def forward(self, x):
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        x = functional.relu(y + (x if self.shortcut is None else self.shortcut(x)))
        # A run has a group a stage: its first state is what the shortcut's block gives.
        truth.state(x, self.layer, axes=IMAGE)
        return x


class ResNet(nn.Module):
    """Two stages of two blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(BasicBlock(0, 16, 1, 16), BasicBlock(1, 16, 1, 16)),
                nn.Sequential(BasicBlock(2, 32, 2, 16), BasicBlock(3, 32, 1, 32)),
            ]
        )
        self.fc = nn.Linear(32, 5)

    def forward(self, image):
        x = self.stem(image)
        truth.state(x, -1, "embed", axes=IMAGE)
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)))


class LastBlock(nn.Module):
    """Channels last, as ConvNeXt of torchvision is inside."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm, self.map = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + functional.gelu(self.map(self.norm(y)))
        truth.state(x, self.layer, axes="b h w d -> b (h w) 1 d")
        return x


class ChannelsLast(nn.Module):
    """A chain over (B, H, W, D)."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.ModuleList(LastBlock(layer) for layer in range(3))

    def forward(self, image):
        x = self.patches(image).permute(0, 2, 3, 1)
        truth.state(x, -1, "embed", axes="b h w d -> b (h w) 1 d")
        for block in self.blocks:
            x = block(x)
        return x.mean((1, 2))


def image(seed: int) -> torch.Tensor:
    return normal(seed, 3, 3, 16, 16)


IMAGE_DESIGNS = (
    Design("codec over time, channels first", Codec, wave, layers="units.{i}", layout="B D T"),
    Design(
        "codec, as many channels as steps", Codec, wave_as_long_as_wide, layers="units.{i}", layout="B D T"
    ),
    Design("ResNet with stages", ResNet, image, layers="stages.*.{i}", layout="B D H W"),
    Design("channels last", ChannelsLast, image, layout="B H W D"),
)
