"""Ranks, cosines and outliers against formulas written out in numpy, and against what is known to happen."""

from __future__ import annotations

import dimensionality
import numpy as np
import pytest
import xarray as xr

from depthscope import diagnostics
from tests.diagnostics.state_runs import run_of


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


@pytest.mark.parametrize("name", RANKS)
def test_noise_lies_at_its_null(name):
    states = np.random.default_rng(3).standard_normal((1, 4, 200, 100))
    analysis = diagnostics.analyze(run_of(states), metrics=[name])
    found = analysis[name].sel(tokens="all").squeeze().transpose("scope", "centering")
    null = analysis[f"{name}_null"].sel(tokens="all").transpose("scope", "centering")
    # The edge of the spectrum has finite-size corrections that the stable rank feels most.
    np.testing.assert_allclose(found, null, rtol=0.06)


def test_dong_residual_keeps_the_square_root(noise):
    found = diagnostics.analyze(run_of(noise), metrics=["dong_residual"])["dong_residual"]
    expected = []
    for x in noise[0].astype(np.float32).astype(float):
        r = x - x.mean(0)
        top = np.abs(r).sum(0).max() * np.abs(r).sum(1).max()
        expected.append(np.sqrt(top / (np.abs(x).sum(0).max() * np.abs(x).sum(1).max())))
    assert float(found.sel(tokens="all")[0, 0, 0]) == pytest.approx(np.mean(expected), rel=1e-6)


@pytest.mark.parametrize("center", [False, True])
def test_token_cosine_is_the_mean_over_pairs(noise, center):
    found = diagnostics.analyze(run_of(noise), metrics=["token_cosine"])["token_cosine"]
    found = found.sel(centering="centred" if center else "raw", tokens="all").isel(step=0, depth=1, stream=0)

    def cosine(x):
        x = x - x.mean(0) if center else x
        u = x / np.linalg.norm(x, axis=1, keepdims=True)
        return (u @ u.T)[~np.eye(len(u), dtype=bool)].mean()

    states = noise[1].astype(np.float32).astype(float)
    assert float(found.sel(scope="sequence")) == pytest.approx(np.mean([cosine(x) for x in states]), abs=1e-7)
    assert float(found.sel(scope="data")) == pytest.approx(cosine(states.reshape(-1, 24)), abs=1e-7)


def test_the_null_of_the_centred_cosine_is_what_noise_gives():
    states = np.random.default_rng(0).standard_normal((1, 400, 5, 64))
    analysis = diagnostics.analyze(run_of(states), metrics=["token_cosine"])
    found = analysis["token_cosine"].sel(scope="sequence", tokens="all").squeeze()
    null = analysis["token_cosine_null"].sel(scope="sequence", tokens="all")
    np.testing.assert_allclose(found, null, atol=0.01)
    np.testing.assert_allclose(null, [0.0, -0.25])


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


def test_attention_without_skips_collapses_and_with_skips_does_not():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 16))
    bare, kept = [x], [x]
    for _ in range(6):
        for states, skip in ((bare, 0.0), (kept, 1.0)):
            scores = states[-1] @ states[-1].T / 16
            weights = np.exp(scores - scores.max(1, keepdims=True))
            mixed = weights / weights.sum(1, keepdims=True) @ states[-1]
            states.append(skip * states[-1] + mixed)
    residual = diagnostics.analyze(run_of(np.array(bare)[:, None]), metrics=["dong_residual"])[
        "dong_residual"
    ]
    profile = residual.sel(tokens="all").squeeze().values
    assert (np.diff(profile[:4]) < 0).all()
    # log r_{l+1} / log r_l → 3 for small residuals
    assert 2.5 < np.log(profile[3]) / np.log(profile[2]) < 4.5
    assert profile[-1] == 0.0
    with_skip = diagnostics.analyze(run_of(np.array(kept)[:, None]), metrics=["dong_residual"])[
        "dong_residual"
    ]
    assert float(with_skip.sel(tokens="all").squeeze()[-1]) > 0.1


def test_the_participation_ratio_of_the_population_is_that_of_the_authors_package(mhc_run):
    found = diagnostics.analyze(mhc_run, metrics="corrected_participation_ratio").isel(step=0)
    value = found["corrected_participation_ratio"].sel(tokens="all", centering="centred", stream="mean")
    states, mask = mhc_run.trace.residual.values.astype(float).mean(3), mhc_run.trace.mask.values
    for depth in (2, 7):
        pooled = states[depth][mask]
        expected = dimensionality.participation_ratio(pooled, return_all=True)["row"]
        assert float(value.sel(scope="data", depth=depth)) == pytest.approx(expected, rel=1e-5)


def test_the_participation_ratio_of_the_population_does_not_grow_with_the_sample():
    rng = np.random.default_rng(0)
    states = rng.standard_normal((1, 512, 64)) * np.geomspace(1, 0.1, 64)
    few, many = (
        [
            float(
                metric(
                    xr.DataArray(states[:, :count], dims=("sample", "token", "feature")),
                    scope="data",
                    center=True,
                )
            )
            for metric in (diagnostics.participation_ratio, diagnostics.corrected_participation_ratio)
        ]
        for count in (48, 512)
    )
    assert many[0] > 1.4 * few[0]
    assert many[1] == pytest.approx(few[1], rel=0.2)


@pytest.mark.parametrize("center", [False, True])
def test_the_numerical_rank_of_noise_is_the_number_of_its_rows(noise, center):
    found = diagnostics.analyze(run_of(noise), metrics=["numerical_rank"])
    pick = {"tokens": "all", "centering": "centred" if center else "raw", "stream": "mean", "step": 0}
    ranks = found["numerical_rank"].sel(pick)
    # 40 tokens a sequence and 120 pooled, of 24 features.
    np.testing.assert_array_equal(ranks, 24.0)
    np.testing.assert_array_equal(found["numerical_rank_null"].sel(tokens="all"), 24.0)


def test_rounding_of_float32_counts_for_no_rank():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 3)) @ rng.standard_normal((3, 20))).astype(np.float32)
    assert float(diagnostics.numerical_rank(xr.DataArray(x, dims=("token", "feature")))) == 3.0
