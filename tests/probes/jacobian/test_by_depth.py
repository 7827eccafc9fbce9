"""Jacobians by depth against dense ones; kept beside a run they are opened again, of the same weights and text alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian as dense_jacobian

from depthscope.diagnostics.experiments import (
    jacobian_rows,
    open_result,
    result_path,
    results_beside,
    save_result,
)
from depthscope.probes.jacobian import jacobians_by_depth
from tests.models.plain_stack import Stack


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.out = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.out(x.cumsum(1)))


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    model, x = Stack(Block(4) for _ in range(3)).double().eval(), torch.randn(1, 3, 4, dtype=torch.float64)
    return model, x, jacobians_by_depth(model, x, values=20)


def dense(function, x) -> np.ndarray:
    return dense_jacobian(function, x).reshape(x.numel(), x.numel()).numpy()


def test_singular_values_and_moments_are_those_of_dense_jacobians(measured):
    model, x, found = measured
    states = [x]
    for block in model.blocks:
        states.append(block(states[-1]).detach())
    exact = [dense(block, state) for block, state in zip(model.blocks, states[:-1], strict=True)]
    exact.append(dense(model, x))
    for row, matrix in zip(jacobian_rows(found), exact, strict=True):
        sigma = np.linalg.svd(matrix, compute_uv=False)
        # Twelve directions have twelve values: what was asked for beyond them is undefined.
        np.testing.assert_allclose(row["singular_values"][:12], sigma, rtol=1e-9)
        assert row["singular_values"][12:] == [None] * 8
        assert abs(row["mean_square"] - np.mean(sigma**2)) < 5 * row["mean_square_error"]
        assert abs(row["square_variance"] - np.var(sigma**2)) < 5 * row["square_variance_error"]
    assert [(row["start"], row["stop"]) for row in jacobian_rows(found)] == [(0, 1), (1, 2), (2, 3), (0, 3)]


def test_an_isometry_has_mean_one_and_no_variance():
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2))).double()
    for layer in model:
        nn.init.orthogonal_(layer.weight)
    found = jacobians_by_depth(model, torch.ones(1, 4, dtype=torch.float64), values=2)
    np.testing.assert_allclose(found.mean_square, 1.0, atol=1e-12)
    np.testing.assert_allclose(found.whole_square_variance, 0.0, atol=1e-12)


def test_a_result_of_other_weights_or_another_text_is_no_result_of_the_run(measured, tmp_path):
    found = measured[2].assign_attrs(weights_digest="sha256:1", data_digest="sha256:2")
    place = save_result(found, result_path(tmp_path / "a.zarr.zip", "jacobian"))
    assert place.name == "a.jacobian.zip"
    np.testing.assert_array_equal(open_result(place).singular_value, found.singular_value)
    assert set(results_beside(tmp_path / "a.zarr.zip", "sha256:1", "sha256:2")) == {"jacobian"}
    assert results_beside(tmp_path / "a.zarr.zip", "sha256:3", "sha256:2") == {}
    assert results_beside(tmp_path / "a.zarr.zip", "sha256:1", "sha256:3") == {}


def test_no_value_is_refused():
    with pytest.raises(ValueError, match="expected how many singular values"):
        jacobians_by_depth(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2), values=0)
