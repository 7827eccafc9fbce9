"""A digest of weights: equal for equal ones, other for any that were trained, none where they are sharded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from depthscope.probes.run.initial_weights import weights_digest


def model(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width), nn.LayerNorm(width)
    )


def test_equal_weights_have_one_digest():
    first = model()
    assert weights_digest(first) == weights_digest(model()) == weights_digest(copy.deepcopy(first).eval())


@pytest.mark.parametrize("number", range(6))
def test_a_step_of_any_parameter_shows(number):
    before, after = model(), model()
    with torch.no_grad():
        list(after.parameters())[number].add_(1e-3)
    assert weights_digest(after) != weights_digest(before)


def test_one_column_of_a_matrix_shows():
    before, after = model(512), model(512)
    with torch.no_grad():
        after[0].weight[:, 5] += 1.0
    assert weights_digest(after) != weights_digest(before)


def test_shapes_names_and_kinds_count():
    plain = weights_digest(model())
    assert weights_digest(model().double()) != plain
    assert weights_digest(nn.Sequential(nn.Identity(), *model())) != plain
    assert weights_digest(model().bfloat16()) is not None


def test_what_is_not_whole_here_has_none():
    assert weights_digest(model().to("meta")) is None
    assert weights_digest(nn.Sequential(nn.LazyLinear(3))) is None
    sharded = model()
    sharded[0].weight.device_mesh = "a mesh"
    assert weights_digest(sharded) is None
