"""Weights whose inputs are nearly all zeros, and batch norms of other data, are named by what one forward shows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from depthscope.probes.model.tensors import OperationsShown
from depthscope.probes.session.kept_bytes import ZeroInputs

WIDTH = 40


def seen(model, *inputs):
    watched = ZeroInputs(model)
    with OperationsShown(watched.note):
        for x in inputs:
            model(x)
    return watched.modules()


@pytest.mark.parametrize(("dead", "named"), [(20, []), (39, ["2"]), (40, ["2"])])
def test_a_layer_behind_units_that_no_token_passes(dead, named):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
    model[0].bias.data[:dead] = -100.0
    assert seen(model, torch.randn(3, 50, 8))["zero_input"] == named


def test_words_that_are_zero_are_the_data_and_no_token_of_a_call_passes_alone():
    torch.manual_seed(0)
    words = torch.eye(WIDTH)[:2]  # 95 % of the words do not come
    assert seen(nn.Sequential(nn.Linear(WIDTH, 4)), words)["zero_input"] == []
    assert seen(nn.Sequential(nn.Linear(WIDTH, 4)), torch.zeros(3, WIDTH))["zero_input"] == ["0"]
    # What one call leaves out another may have: both are looked at.
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, 4))
    model[0].weight.data = torch.eye(WIDTH)
    assert seen(model, torch.eye(WIDTH)[:20], torch.eye(WIDTH)[20:])["zero_input"] == []


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
    assert seen(model, of_data)["stale_statistics"] == []  # it takes those of the batch
    assert seen(model.eval(), of_data)["stale_statistics"] == (["1"] if is_other else [])
