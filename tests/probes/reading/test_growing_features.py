"""Is a network whose blocks put features next to those before read as states that grow, however it is written?"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import depthscope as ds

WIDTH, GROWTH, BLOCKS = 6, 4, 2


class Layer(nn.Module):
    """What a block computes: a few more features of all that it takes."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, GROWTH, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(functional.relu(self.norm(x)))


class Dense(nn.Module):
    """Two stages of blocks, whose features are put next to each other in one of three ways."""

    def __init__(self, way: str):
        super().__init__()
        self.way, self.states = way, list[torch.Tensor]()
        self.stem, self.narrow = (
            nn.Conv2d(3, WIDTH, 3, padding=1),
            nn.Conv2d(WIDTH + BLOCKS * GROWTH, WIDTH, 1),
        )
        stages = ([Layer(WIDTH + n * GROWTH) for n in range(BLOCKS)] for _ in range(2))
        self.first, self.second = (nn.ModuleList(layers) for layers in stages)
        self.head = nn.Linear(WIDTH + BLOCKS * GROWTH, 5)

    def stage(self, x: torch.Tensor, layers: nn.ModuleList) -> torch.Tensor:
        if self.way == "list":
            features = [x]
            for layer in layers:
                features.append(layer(torch.cat(features, 1)))
            return torch.cat(features, 1)
        self.keep(x)
        for layer in layers:
            x = torch.cat([x, layer(x)] if self.way == "after" else [layer(x), x], 1)
            self.keep(x)
        return x

    def keep(self, x: torch.Tensor) -> None:
        if x.requires_grad:
            x.retain_grad()
        self.states.append(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.avg_pool2d(self.narrow(self.stage(self.stem(x), self.first)), 2)
        return self.head(self.stage(x, self.second).mean((2, 3)))


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(3, 3, 8, 8)


def made(way: str) -> Dense:
    torch.manual_seed(0)
    return Dense(way).eval()


def loss(output: torch.Tensor, batch: object) -> torch.Tensor:
    return output.square().sum()


@pytest.mark.parametrize("way", ["after", "before", "list"])
def test_every_state_has_the_features_that_exist_and_their_gradient(way: str, batch: torch.Tensor):
    reference = made("before" if way == "before" else "after")
    loss(reference(batch), batch).backward()

    run = ds.capture(made(way), batch, gradients=True, loss=loss)

    stages = [run.trace[f"stage{n}"].dataset for n in range(2 * BLOCKS + 2)]
    assert all(stage.attrs["proof"] == "proven" for stage in stages)
    for stage, true in zip(stages, reference.states, strict=True):
        for name, of in (("residual", true.detach()), ("gradient", true.grad)):
            mine = torch.from_numpy(stage[name].values)[0, :, :, 0]
            torch.testing.assert_close(mine, of.flatten(2).mT, rtol=1e-4, atol=1e-6)


def test_the_blocks_are_those_that_add_features(batch: torch.Tensor):
    found = ds.describe(made("list"), batch)

    assert "4 × Layer" in str(found)
    assert "unproven" not in str(found)


class Refined(nn.Module):
    """A U-net whose last blocks have residuals over what came up next to the first features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 2 * WIDTH, 2, 2)
        self.up = nn.ConvTranspose2d(2 * WIDTH, WIDTH, 2, 2)
        self.inner, self.blocks = (
            nn.ModuleList(nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1) for _ in range(BLOCKS))
            for _ in range(2)
        )
        self.head = nn.Conv2d(2 * WIDTH, 3, 1)
        self.states: list[torch.Tensor] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        first = self.stem(image)
        x = self.down(first)
        for block in self.inner:
            x = x + block(x).relu()
        x = torch.cat([self.up(x), first], 1)
        self.states = [first, x]
        for block in self.blocks:
            x = x + block(x).relu()
            self.states.append(x)
        return image + self.head(x)


def test_features_that_come_up_next_to_the_first_ones_are_states_and_the_inner_blocks_are_named(
    batch: torch.Tensor,
):
    torch.manual_seed(0)
    model = Refined()

    run = ds.capture(model, batch, loss=loss)

    found = [run.trace[f"stage{n}"].dataset for n in range(2)]
    assert all(stage.attrs["proof"] == "proven" for stage in found)
    for at, true in zip([(0, 0), (1, 0), (1, 1), (1, 2)], model.states, strict=True):
        mine = torch.from_numpy(found[at[0]]["residual"].values)[at[1], :, :, 0]
        torch.testing.assert_close(mine, true.detach().flatten(2).mT, rtol=1e-5, atol=1e-6)
    assert [part["module"] for part in run.attrs["not_covered"]] == ["inner"]
