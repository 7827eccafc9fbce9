"""Factors of plain connections are found from the states and outputs alone, or not at all."""

from __future__ import annotations

import pytest
import torch

from depthscope.probes.run.linear_variables import plain_factors

TOKENS, WIDTH = 40, 32


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(TOKENS, WIDTH, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_has_no_factors(tensors, dtype):
    x, f, g = (tensor.to(dtype) for tensor in tensors)
    found = plain_factors(x.float(), [f.float(), g.float()], (x + f + g).float(), dtype)
    assert found.known
    assert (found.keep, found.write) == (None, (None, None))


def test_a_tiny_branch_is_not_taken_for_one_that_is_added_in_full(tensors):
    x, f, _ = tensors
    small = 1e-5 * f
    found = plain_factors(x, [small], x + 0.5 * small, torch.float32)
    # To rounding the state did not change: then nothing is claimed of the factor but what the numbers give.
    assert not found.known or found.write[0] is not None
    assert not (found.known and found.write[0] is not None and abs(float(found.write[0].mean()) - 0.5) > 0.1)


@pytest.mark.parametrize("factor", ["number", "token", "feature"])
def test_factors_are_found_as_simple_as_they_are(tensors, factor):
    x, f, g = tensors
    shape = {"number": (1, 1), "token": (TOKENS, 1), "feature": (1, WIDTH)}[factor]
    a, b, c = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1)) + 0.5
    found = plain_factors(x, [f, g], a * x + b * f + c * g, torch.float32)
    assert found.known
    for value, expected in zip((found.keep, *found.write), (a, b, c), strict=True):
        assert value.shape == ((TOKENS, 1) if factor == "number" else shape)
        torch.testing.assert_close(value, expected.double().expand_as(value), rtol=1e-4, atol=1e-5)


def test_a_norm_of_the_sum_has_no_such_factors(tensors):
    x, f, _ = tensors
    normed = torch.nn.functional.layer_norm(x + f, (WIDTH,))
    found = plain_factors(x, [f], normed, torch.float32)
    assert not found.known
    assert found.error > 0.01


def test_a_state_and_a_branch_that_are_parallel_tell_nothing(tensors):
    x, _, _ = tensors
    assert not plain_factors(x, [2 * x], 1.5 * x + 2 * x, torch.float32).known


def test_few_numbers_are_fitted_by_chance_and_not_believed():
    x, f, y = torch.randn(3, 1, 3, generator=torch.Generator().manual_seed(0))
    assert not plain_factors(x, [f], y, torch.float32).known


def test_a_gate_a_token_is_no_single_number_where_the_branch_is_small_and_the_precision_low(tensors):
    x, f, _ = tensors
    gate = torch.rand(TOKENS, 1, generator=torch.Generator().manual_seed(1))
    found = plain_factors(x, [0.05 * f], (x + gate * (0.05 * f)).bfloat16().float(), torch.bfloat16)
    assert not found.known or found.write[0].std() > 0.1


def test_a_gate_of_zero_is_found(tensors):
    x, f, _ = tensors
    found = plain_factors(x, [f], x, torch.float32)
    assert found.known
    assert float(found.write[0].abs().max()) < 1e-6


def test_the_factor_of_a_branch_that_gives_nothing_is_unknown(tensors):
    x, f, _ = tensors
    assert not plain_factors(x, [0 * f], x, torch.float32).known
