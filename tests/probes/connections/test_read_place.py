"""Is H_pre, which is looked for where it was in the step before, what a search of all tensors finds?"""

from __future__ import annotations

import numpy as np
import torch

import depthscope as ds
from depthscope.probes.connections import reading
from tests.models.stream_models import deepseek_v4

STEPS = 3


def recorded(monkeypatch, *, remembered: bool):
    """A run of some steps, and among how many tensors each search was."""
    torch.manual_seed(0)
    model, ids = deepseek_v4(), torch.randint(3, 64, (2, 9))
    optimizer, sizes = torch.optim.SGD(model.parameters(), lr=0.1), []
    search = reading.find_read_weights

    def counted(x, branch_in, candidates, **more):
        sizes.append(len(candidates))
        return search(x, branch_in, candidates, **more)

    with monkeypatch.context() as patch:
        patch.setattr(reading, "find_read_weights", counted)
        if not remembered:
            patch.setattr(
                reading.ReadPlace, "__setattr__", lambda self, name, value: vars(self).update(among=0)
            )
        with ds.record(model, every=1) as recorder:
            for _ in range(STEPS):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                recorder.step()
        return recorder.run, sizes


def test_the_place_of_the_read_weights_is_remembered_and_gives_the_same_numbers(monkeypatch):
    (run, sizes), (searched, all_sizes) = (recorded(monkeypatch, remembered=of) for of in (True, False))
    assert min(all_sizes) > 1
    # At every connection, from the second step on.
    assert sizes.count(1) == len(sizes) * (STEPS - 1) // STEPS == len(all_sizes) * (STEPS - 1) // STEPS
    np.testing.assert_array_equal(run["trace"]["h_pre"], searched["trace"]["h_pre"])
    np.testing.assert_array_equal(run["statistics"]["gain_max"], searched["statistics"]["gain_max"])
