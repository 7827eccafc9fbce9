"""Ranks, outliers and the share of the sequence against formulas written out in numpy, and against what is known to happen."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from depthscope import diagnostics
from tests.diagnostics.state_runs import run_of, walk


@pytest.fixture(scope="module")
def noise():
    rng = np.random.default_rng(1)
    return rng.standard_normal((2, 3, 40, 24)) @ np.diag(np.arange(1, 25) ** -0.5)


def spectrum(x, center):
    return np.linalg.svd(x - x.mean(0) if center else x, compute_uv=False)


RANKS = {
    "effective_rank": lambda s: np.exp(-np.sum(s / s.sum() * np.log(s / s.sum()))),
    "participation_ratio": lambda s: (s**2).sum() ** 2 / (s**4).sum(),
}


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("name", RANKS)
def test_ranks_within_a_sequence_and_over_the_data(noise, name, center):
    analysis = diagnostics.analyze(run_of(noise), metrics=[name])
    pick = {"tokens": "all", "centering": "centred" if center else "raw", "depth": 1, "stream": "mean"}
    found = analysis[name].sel(pick).isel(step=0)
    states = noise[1].astype(np.float32).astype(float)
    each = [RANKS[name](spectrum(x, center)) for x in states]
    assert float(found.sel(scope="sequence")) == pytest.approx(np.mean(each), rel=1e-6)
    pooled = RANKS[name](spectrum(states.reshape(-1, 24), center))
    assert float(found.sel(scope="data")) == pytest.approx(pooled, rel=1e-6)
    stderr = analysis[f"{name}_stderr"].sel(pick).sel(scope="sequence").item()
    assert stderr == pytest.approx(np.std(each, ddof=1) / np.sqrt(3), rel=1e-5)


def test_ordinary_tokens_leave_out_the_massive_ones_at_every_depth(noise):
    states = np.array(noise) * 0.5
    states[1, :, 0, 7] = 20000.0
    analysis = diagnostics.analyze(run_of(states))
    counts = analysis["num_tokens"].isel(depth=0, stream=0)
    assert counts.sel(scope="sequence").values.tolist() == [40.0, 39.0]
    assert counts.sel(scope="data").values.tolist() == [120.0, 117.0]
    fraction = analysis["massive_token_fraction"].squeeze()
    np.testing.assert_allclose(fraction, [0.0, 3 / 120])
    assert fraction.attrs["massive_features"] == [7]
    assert fraction.attrs["massive_tokens"] == [[0, 0], [1, 0], [2, 0]]
    rank = analysis["effective_rank"].sel(scope="data", centering="raw").isel(step=0, depth=1, stream=0)
    assert float(rank.sel(tokens="all")) < 1.5
    expected = RANKS["effective_rank"](spectrum(states[1][:, 1:].reshape(-1, 24).astype(np.float32), False))
    assert float(rank.sel(tokens="ordinary")) == pytest.approx(expected, rel=1e-5)
    ratio = analysis["massive_activation"].squeeze()
    entries = np.abs(states[1].astype(np.float32))
    assert float(ratio[1]) == pytest.approx(entries.max() / np.median(entries), rel=1e-6)


def test_rounding_of_float32_counts_for_no_rank():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 3)) @ rng.standard_normal((3, 20))).astype(np.float32)
    assert float(diagnostics.numerical_rank(xr.DataArray(x, dims=("token", "feature")))) == 3.0


def test_the_dong_residual_is_the_distance_from_equal_tokens_in_the_norm_of_paths(noise):
    def size(x):
        return np.sqrt(np.abs(x).sum(0).max() * np.abs(x).sum(1).max())

    found = diagnostics.analyze(run_of(noise), metrics="dong_residual")["dong_residual"].isel(step=0, depth=1)
    states = noise[1].astype(np.float32).astype(float)
    each = [size(x - x.mean(0)) / size(x) for x in states]
    assert float(found.sel(tokens="all", stream="mean")) == pytest.approx(np.mean(each), rel=1e-6)


# --- does a state depend on the sequence


def measured(states, name):
    return diagnostics.analyze(run_of(states), metrics=name)[name].isel(step=0).sel(stream="mean").values


def test_the_share_between_sequences():
    states = walk(4)
    states[3] = states[3][:1]  # one sequence for all
    states[4] = states[4][:, :1]  # one token at every position
    share = measured(states, "sequence_share")
    assert share[1] == pytest.approx(2 / 3, abs=0.1)  # of three independent sequences, about their mean
    assert share[3] == pytest.approx(0.0, abs=1e-12)
    assert share[4] == pytest.approx(1.0)


def test_padding_and_a_huge_token_do_not_count():
    states = walk(2)
    run = run_of(states)
    expected = diagnostics.analyze(run, metrics="sequence_share")["sequence_share"].values
    huge = states.copy()
    huge[:, 0, 0] *= 1e6  # the same directions
    found = diagnostics.analyze(run_of(huge), metrics="sequence_share")["sequence_share"].values
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    padded = run["trace"].to_dataset().load().copy(deep=True)
    padded["mask"].values[:, 20:] = False
    other = padded.copy(deep=True)
    other["residual"].values[:, :, 20:] = 7.0
    values = [
        diagnostics.analyze(diagnostics.create_run(each, attrs=run.attrs), metrics="sequence_share")[
            "sequence_share"
        ].values
        for each in (padded, other)
    ]
    np.testing.assert_allclose(*values)
