"""Exponents of what training changes: closed forms of one Adam step, a loop by hand, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
import xarray as xr
from torch import nn

import depthscope as ds
from depthscope.diagnostics.experiments.scaling import (
    fit_exponent,
    scaling_rows,
    scaling_sentence,
    with_exponents,
)
from depthscope.probes.coordinate_check import ScalingError

RATE = 1e-3


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.matrix = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return x + self.matrix(x)


class Stack(nn.Module):
    """A fixed embedding, linear blocks on a skip, and a head; every token is the same one."""

    def __init__(self, width=16, depth=2):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 3)
        self.embed.weight.requires_grad_(requires_grad=False)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = torch.full((2, 5), 7)
IDS[1] = 4


def square(output, batch):
    return output[0].square().mean()  # of the first sequence, whose tokens are equal


def adam(power):
    return lambda model, size: torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=RATE * size**-power
    )


@pytest.fixture(scope="module", params=[0.0, 1.0])
def checked(request):
    found = ds.coordinate_check(
        Stack, IDS, (16, 32, 64, 128), seeds=2, steps=1, optimizer=adam(request.param), loss=square
    )
    return request.param, found


def test_one_step_of_adam_moves_a_feature_by_the_sum_of_its_inputs(checked):
    """ΔW = η sign(δ uᵀ) where all tokens are equal, so that ΔW u = η ‖u‖₁ sign(δ): exponent 1, or 0 with η/D."""
    power, found = checked
    for size in found["size"].values:
        for seed in range(2):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                u = Stack(int(size)).embed.weight.detach()
            # The second sequence has another token, and is moved along the first one's signs.
            reach = [float((u[token] * u[7].sign()).sum()) for token in (7, 4)]
            expected = RATE * size**-power * np.sqrt(np.mean(np.square(reach)))
            change = float(found["change"].sel(size=size, seed=seed, place="depth 1"))
            assert change == pytest.approx(expected, rel=1e-2)  # Adam's epsilon
    row = scaling_rows(found)[1]
    assert row["change_exponent"] == pytest.approx(1.0 - power, abs=0.15)
    assert found["change"].sel(place="depth 0").max() == 0  # the embedding is fixed
    assert scaling_rows(found)[0]["change_exponent"] is None


def test_the_sentence_says_what_the_exponents_mean(checked):
    power, found = checked
    sentence = scaling_sentence(found.sel(place=["depth 0", "depth 1"]))
    if power:
        assert "width-stable within 0.25 (this project) at every depth" in sentence
    else:
        assert "not width-stable. Give hidden matrices a learning rate" in sentence


def states(model):
    with torch.no_grad():
        x = [model.embed(IDS)]
        for layer in model.layers:
            x.append(layer(x[-1]))
        return [*x, model.head(x[-1])]


def test_states_sizes_and_losses_equal_a_loop():
    found = ds.coordinate_check(Stack, IDS, (8, 16), seeds=1, steps=3, learning_rate=RATE, loss=square)
    for size in (8, 16):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Stack(size)
            before, losses = states(model), []
            optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
            for _ in range(3):
                value = square(model(IDS), IDS)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                losses.append(value.item())
        of_size = found.sel(size=size, seed=0)
        rms = [float(x.square().mean().sqrt()) for x in before]
        np.testing.assert_allclose(of_size["start"], rms, rtol=1e-5)
        moved = [
            float((new - old).square().mean().sqrt()) for old, new in zip(before, states(model), strict=True)
        ]
        np.testing.assert_allclose(of_size["change"], moved, rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(of_size["loss"], losses, rtol=1e-5)
    assert scaling_sentence(found).endswith("2 widths give no error, take 5 or more.")
    assert list(found["place"].values) == ["depth 0", "depth 1", "depth 2", "output"]


def test_models_of_several_depths_are_compared_at_shares_of_them():
    def make(depth):
        return Stack(8, depth)

    found = ds.coordinate_check(make, IDS, (4, 6), over="depth", seeds=1, steps=1, loss=square)
    assert list(found["place"].values)[:2] == ["the embedding", "a quarter"]
    assert found.sizes["place"] == 6
    ends = ds.coordinate_check(make, IDS, (1, 3), over="depth", seeds=1, steps=1, loss=square)
    assert list(ends["place"].values) == ["the embedding", "the last state", "output"]


def test_the_callers_random_state_is_not_touched():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    ds.coordinate_check(Stack, IDS, (8, 16), seeds=1, steps=1, loss=square)
    assert torch.rand(1) == expected


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ScalingError, match=r"got the sizes \[8\]; expected two or more"):
        ds.coordinate_check(Stack, IDS, (8,))
    with pytest.raises(ScalingError, match="got 0 seeds"):
        ds.coordinate_check(Stack, IDS, (8, 16), seeds=0)
    with pytest.raises(ds.CaptureError, match="pass loss="):
        ds.coordinate_check(Stack, IDS, (8, 16), seeds=1)
    with pytest.raises(ScalingError, match="no parameter to train"):
        ds.coordinate_check(
            lambda size: Stack(size).requires_grad_(requires_grad=False), IDS, (8, 16), loss=square
        )


def test_a_model_that_diverges_is_told():
    found = ds.coordinate_check(
        Stack, IDS, (8, 16, 32), seeds=1, steps=4, learning_rate=1e30, loss=lambda y, _: y.square().mean()
    )
    assert scaling_sentence(found).startswith("The states are not finite after training at width 8")


# --- the fit


def test_the_exponent_and_its_interval_are_those_of_scipy():
    rng = np.random.default_rng(0)
    sizes = np.array([16, 32, 64, 128, 256])
    values = 3.0 * sizes[:, None] ** 0.5 * np.exp(0.1 * rng.standard_normal((5, 3)))
    found = fit_exponent(sizes, values)
    line = scipy.stats.linregress(np.log(sizes), np.log(values).mean(1))
    assert found.mean == pytest.approx(line.slope)
    assert found.error == pytest.approx(line.stderr)
    assert found.high == pytest.approx(line.slope + scipy.stats.t.ppf(0.975, 3) * line.stderr)


def test_the_interval_covers_as_it_says():
    rng = np.random.default_rng(1)
    sizes = np.array([16, 32, 64, 128])
    draws = sizes[:, None] ** 0.3 * np.exp(0.2 * rng.standard_normal((1000, 4, 1)))
    fits = [fit_exponent(sizes, draw) for draw in draws]
    covered = np.mean([fit.low <= 0.3 <= fit.high for fit in fits])
    assert 0.93 < covered < 0.97


def result(exponent, scatter, sizes=(16, 32, 64, 128), seeds=2):
    rng = np.random.default_rng(0)
    change = np.array(sizes, float)[:, None, None] ** exponent * np.exp(
        scatter * rng.standard_normal((len(sizes), seeds, 2))
    )
    points = xr.Dataset(
        {name: (("size", "seed", "place"), change) for name in ("start", "change")},
        {"size": list(sizes), "place": np.array(["depth 0", "output"], dtype=object)},
        {"over": "width"},
    )
    return with_exponents(points)


@pytest.mark.parametrize(
    ("exponent", "scatter", "words"),
    [
        (0.0, 0.01, "width-stable within 0.25"),
        (0.5, 0.01, "by width^0.5"),
        (-0.5, 0.01, "a learning rate or a multiplier falls too fast"),
        (0.1, 1.0, "not decided whether it is width-stable"),
    ],
)
def test_sentences(exponent, scatter, words):
    assert words in scaling_sentence(result(exponent, scatter))
