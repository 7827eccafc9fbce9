"""Every statistic against numpy in float64, on whatever a model may hand over: strided, padded, huge, tiny, rewritten."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from depthscope.probes.statistics import block_statistics
from depthscope.probes.statistics.token_sums import TokenSums

B, T, N, D = 3, 11, 2, 16
STREAMS_APART = (0, 2, 1, 3)  # as lucidrains' connections hold them: (B N) T D


@pytest.fixture(params=[1, 4, 1000], ids=["token by token", "ragged", "at once"])
def blocks(request, monkeypatch) -> None:
    """Sizes of a block, in tokens."""
    monkeypatch.setattr(block_statistics, "BLOCK_NUMBERS_CPU", request.param * N * D)


def draw(seed: int, *, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * (torch.randn(B, T, N, D, generator=generator) + offset)


def some_padding() -> torch.Tensor:
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :4] = False
    mask[2, 7:] = False
    return mask


def expected(states: list[torch.Tensor], mask: torch.Tensor | None) -> dict[str, np.ndarray]:
    """The definitions, written down once more."""
    real = np.ones((B, T), bool) if mask is None else mask.numpy()
    x = np.stack([state.double().numpy()[real] for state in states])
    norm = np.sqrt((x**2).sum(-1))
    with np.errstate(invalid="ignore"):
        unit = np.where(norm[..., None] > 0, x / norm[..., None], 0.0)
    return {
        "token_count": np.full(len(states), real.sum()),
        "norm_sum": norm.sum(1),
        "square_norm_sum": (norm**2).sum(1),
        "norm_max": norm.max(1),
        "abs_max": np.abs(x).max((1, 3)),
        "feature_sum": x.sum(1),
        "unit_sum": unit.sum(1),
        "unit_count": (norm > 0).sum(1),
        "adjacent_cosine_sum": (unit[1:] * unit[:-1]).sum((1, 3)),
    }


def seen(states: list[torch.Tensor], mask: torch.Tensor | None = None) -> TokenSums:
    sums = TokenSums()
    for depth, state in enumerate(states):
        sums.add_state(depth, state, mask)
    sums.end_forward()
    return sums


def assert_as_defined(
    sums: TokenSums, states: list[torch.Tensor], mask: torch.Tensor | None, rtol: float = 1e-6
) -> None:
    for name, value in expected(states, mask).items():
        keys = range(len(states) - len(value), len(states))
        size = np.abs(value).max()
        np.testing.assert_allclose(sums.array(name, keys), value, rtol=rtol, atol=rtol * size, err_msg=name)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, some_padding()], ids=["unpadded", "padded"])
def test_every_statistic_is_the_defined_one(dtype, mask):
    states = [draw(seed).to(dtype) for seed in range(3)]
    assert_as_defined(seen(states, mask), states, mask)


@pytest.mark.usefixtures("blocks")
def test_streams_that_lie_apart_give_the_same():
    states = [draw(seed) for seed in range(3)]
    strided = [state.permute(STREAMS_APART).contiguous().permute(STREAMS_APART) for state in states]
    mixed = [strided[0], states[1], strided[2]]
    assert not strided[0].is_contiguous()
    assert_as_defined(seen(mixed, some_padding()), states, some_padding())


@pytest.mark.parametrize("filling", [float("nan"), -float("inf"), 1e30])
def test_what_padding_holds_does_not_matter(filling):
    mask = some_padding()
    states = [draw(seed) for seed in range(2)]
    filled = [torch.where(mask[..., None, None], state, filling) for state in states]
    assert_as_defined(seen(filled, mask), states, mask)
    sums = TokenSums()
    sums.add_gradient(0, filled[0], mask)
    square = (states[0].double() ** 2 * mask[..., None, None]).sum((0, 1, 3))
    np.testing.assert_allclose(sums.array("gradient_square_norm_sum", [0])[0], square, rtol=1e-6)


def test_nan_in_a_real_token_is_seen_in_its_stream_only():
    state = draw(0)
    state[1, 3, 0, 5] = float("nan")
    sums = seen([draw(1), state, draw(2)])
    for name in ("norm_sum", "square_norm_sum", "norm_max", "abs_max", "adjacent_cosine_sum"):
        values = sums.array(name, [1])[0]
        assert np.isnan(values[0]), name
        assert np.isfinite(values[1]), name
    feature_sum = sums.array("feature_sum", [1])[0]
    assert np.argwhere(np.isnan(feature_sum)).tolist() == [[0, 5]]
    assert np.isnan(sums.array("unit_sum", [1])[0, 0]).all()
    assert np.isnan(sums.array("adjacent_cosine_sum", [2])[0, 0])


def test_infinity_in_a_real_token_is_seen():
    state = draw(0)
    state[0, 0, 1, 2] = -float("inf")
    sums = seen([state])
    for name in ("norm_sum", "square_norm_sum", "norm_max", "abs_max"):
        assert np.isfinite(sums.array(name, [0])[0, 0])
        assert sums.array(name, [0])[0, 1] == np.inf, name


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_that_float32_cannot_hold(scale):
    """A network that dies or explodes is what these numbers are for."""
    states = [draw(seed, scale=scale) for seed in range(2)]
    assert_as_defined(seen(states), states, None)
    sums = TokenSums()
    sums.add_gradient(0, states[0], None)
    np.testing.assert_allclose(
        sums.array("gradient_square_norm_sum", [0])[0], (states[0].double() ** 2).sum((0, 1, 3)), rtol=1e-6
    )


def test_cosines_are_of_neighbours_in_one_forward_only():
    sums = TokenSums()
    sums.add_state(0, draw(0), None)
    sums.add_state(2, draw(1), None)  # depth 1 was skipped
    sums.add_state(3, draw(2)[:, :5], None)  # fewer tokens
    sums.end_forward()
    sums.add_state(4, draw(3)[:, :5], None)  # another forward
    assert sums.array("adjacent_cosine_sum", range(5)) is None
    sums.add_state(5, draw(4)[:, :5], None)
    assert np.isfinite(sums.array("adjacent_cosine_sum", range(6))[5]).all()


def test_nothing_waits_for_the_device():
    """A meta tensor has no numbers, so that reading one back raises."""
    mask = torch.ones(B, T, dtype=torch.bool, device="meta")
    sums = TokenSums()
    for given in (None, mask):
        for depth in range(2):
            sums.add_state(depth, torch.empty(B, T, N, D, device="meta"), given)
            sums.add_gradient(depth, torch.empty(B, T, N, D, device="meta"), given)
        sums.add_mixing(0, torch.empty(B, T, N, N, device="meta"), given)
        sums.end_forward()
    sums.merge(sums.compact())
    assert sums.sums["norm_sum"][1].device.type == "meta"
