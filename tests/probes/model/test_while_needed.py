"""Is the search for garbage put off while we measure, and on again afterwards as it was?"""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from depthscope import probes
from depthscope.probes.model.preserved_state import no_collection


class Seeing(nn.Module):
    """A block that notes whether the collector is on while it runs."""

    def __init__(self, notes):
        super().__init__()
        self.layer, self.notes = nn.Linear(8, 8), notes

    def forward(self, x):
        self.notes.append(gc.isenabled())
        return x + self.layer(x).relu()


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_off_in_a_forward_of_ours_and_as_it_was_after_it(was_on):
    notes: list[bool] = []
    model = nn.Sequential(*(Seeing(notes) for _ in range(3)))
    before = gc.isenabled()
    try:
        (gc.enable if was_on else gc.disable)()
        probes.describe(model, torch.randn(2, 3, 8))
        assert gc.isenabled() == was_on
        assert not any(notes)
        with pytest.raises(RuntimeError), no_collection():
            model(torch.randn(2, 3, 9))
        assert gc.isenabled() == was_on
    finally:
        (gc.enable if before else gc.disable)()


def test_the_last_of_several_measurements_switches_it_on_again():
    with no_collection():
        with no_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
