"""Is a row the same whose sums were copied to the host?"""

from __future__ import annotations

import numpy as np
import torch

from depthscope import probes
from depthscope.probes.training.live import live as live_module
from depthscope.probes.training.live import row as module
from tests.models.sinkhorn_model import SinkhornModel, ids, loss


def rows() -> list:
    model = SinkhornModel()
    with probes.record(model, gradients=True, metrics="all") as recorder:
        for step in range(2):
            batch = ids(seed=step)
            loss(model(batch), batch).backward()
            recorder.step()
    return recorder._live.rows


def test_a_copy_gives_the_row_of_the_sums(monkeypatch):
    expected = rows()
    copied = []

    def copies(sums):
        copied.append([module._changed(chain, torch.clone) for chain in sums])
        return copied[-1]

    monkeypatch.setattr(live_module, "on_host", copies)
    for row, other in zip(rows(), expected, strict=True):
        assert row.numbers.keys() == other.numbers.keys()
        for name, (dims, values, _) in row.numbers.items():
            assert dims == other.numbers[name][0]
            np.testing.assert_array_equal(values, other.numbers[name][1], err_msg=name)
    assert all(module.on_host(sums) == sums for sums in copied)  # what is there already is not copied again
