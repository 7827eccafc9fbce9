"""Does the proof see a wrong part, a missing branch, and a first state that is none?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from depthscope.probes.reading import choice, connections
from tests.models.designs.catalogue import DESIGNS
from tests.models.recorded import read_model, reading_of


def named(name: str):
    return next(design for design in DESIGNS if design.name == name)


@pytest.mark.parametrize(
    "name",
    [
        "pre-norm, tensor in and out",
        "streams in a list, numbers one by one",
        "reads of the mean of two states",
    ],
)
def test_a_matrix_that_is_not_the_models_is_unproven(monkeypatch, name):
    true = connections.weights
    monkeypatch.setattr(connections, "weights", lambda found: true(found) + 0.01)

    (found,) = reading_of(named(name)).memories

    assert found.proof.startswith("unproven: state 1 is off by")


def test_branches_that_a_sum_hides_are_missed(monkeypatch):
    monkeypatch.setattr(choice, "hidden_sums", lambda memory, branches: {})

    found = reading_of(named("sums of two branches, read when complete"))

    assert found.refused or not found.memories[0].is_proven


class Late(nn.Module):
    """The state is doubled in width after the first block, by a linear map: the first block is before the first state."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        x = self.wide(x + self.first(x).relu())
        for block in self.blocks:
            x = x + block(x).relu()
        return x


def test_a_branch_before_the_first_state_belongs_to_a_memory_of_its_own():
    found = read_model(Late(), torch.randn(2, 5, 8))

    assert [len(memory.states) for memory in found.memories] == [4, 2]
    assert all(memory.is_proven for memory in found.memories)


def test_what_is_no_residual_network_is_refused_with_the_reason():
    found = read_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 4))

    assert not found.memories
    assert found.refused.startswith("no residual stream was found")
