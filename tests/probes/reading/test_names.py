"""What are branches, blocks and memories called?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import depthscope as ds
from tests.models.designs.catalogue import DESIGNS
from tests.models.recorded import reading_of


def read(name: str):
    return reading_of(next(design for design in DESIGNS if design.name == name)).memories


@pytest.mark.parametrize(
    ("name", "paths", "kinds"),
    [
        (
            "pre-norm, tensor in and out",
            ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn"],
            ["attn", "mlp", "attn"],
        ),
        (
            "universal transformer",
            ["blocks.0.attn", "blocks.0.mlp", "blocks.0.attn"],
            ["attn", "mlp", "attn"],
        ),
    ],
)
def test_a_branch_has_the_path_of_its_module_and_its_kind(name, paths, kinds):
    (memory,) = read(name)
    branches = memory.branches[:3]

    assert [branch.path for branch in branches] == paths
    assert [branch.kind for branch in branches] == kinds
    assert [branch.layer for branch in branches] == [0, 0, 1]


def test_a_memory_is_called_as_its_blocks_and_two_towers_have_two():
    assert [memory.name for memory in read("pre-norm, tensor in and out")] == ["blocks"]
    assert len({memory.name for memory in read("two towers, one before the other")}) == 2


def test_a_module_with_two_names_is_described():
    """As in peft's prompt tuning, where the embedding of the base model is also the wrapper's."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))
            self.first = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
            self.other = self.first  # before the chain, by two names

        def forward(self, x):
            x = self.other(x)
            for layer in self.layers:
                x = x + layer(x)
            return x

    found = ds.describe(Wrapper(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)))
    assert found.family == "residual"
