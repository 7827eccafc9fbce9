"""Batch norms of other data are named by what one forward shows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from depthscope.probes.model.tensors import OperationsShown
from depthscope.probes.session.kept_bytes import NormInputs


def seen(model, *inputs):
    watched = NormInputs(model)
    with OperationsShown(watched.note):
        for x in inputs:
            model(x)
    return watched.foreign()


@pytest.mark.parametrize(
    ("scale", "shift", "is_other"), [(1.5, 0.0, False), (10.0, 0.0, True), (0.1, 0.0, True), (1.0, 9.0, True)]
)
def test_a_batch_norm_that_was_trained_on_other_data(scale, shift, is_other):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))
    x = torch.randn(20, 3, 4, 4)
    for _ in range(60):
        model(x)
    of_data = scale * x + shift
    assert seen(model, of_data) == []  # it takes those of the batch
    assert seen(model.eval(), of_data) == (["1"] if is_other else [])
