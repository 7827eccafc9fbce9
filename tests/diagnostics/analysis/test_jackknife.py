"""Standard errors against closed forms, against recomputation by hand, and by how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from depthscope import CATALOGUE, diagnostics
from depthscope.diagnostics import schema
from depthscope.diagnostics.analysis.jackknife import jackknife, resampled
from depthscope.diagnostics.kernels import similarity
from depthscope.diagnostics.quantities.tokens import evenly_spaced


@pytest.fixture
def run_of(make_run):
    """A residual run of states (depth, sample, token, feature) without padding."""

    def build(states):
        depths, samples, tokens, features = states.shape
        sizes = {"layers": depths - 1, "samples": samples, "tokens": tokens, "features": features}
        run = make_run("residual", **sizes, gradients=False, weights=False)
        trace = run["trace"].to_dataset().load()
        trace["residual"].values[:] = states[:, :, :, None]
        trace["mask"].values[:] = True
        return schema.create_run(trace, attrs=run.attrs)

    return build


def test_the_error_of_a_mean_is_that_of_the_mean(run_of):
    states = np.random.default_rng(0).standard_normal((2, 7, 5, 3))
    found = diagnostics.analyze(
        run_of(states), metrics=["channel_variance", "block_influence"], jackknife=True
    )
    x, y = states.astype(np.float32).astype(float)
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    each = (1 - cosine).mean(
        1
    )  # as many tokens in every sequence: the mean over tokens is that over sequences
    error = found["block_influence_stderr"].sel(tokens="all").isel(step=0, depth=1)
    assert float(error) == pytest.approx(each.std(ddof=1) / 7**0.5, rel=1e-6)
    assert error.attrs["estimator"] == "delete-one jackknife over 7 sequences"
    pooled = x.reshape(-1, 3)
    values = np.array([np.delete(x, s, axis=0).reshape(-1, 3).var(0).mean() for s in range(7)])
    expected = np.sqrt(6 / 7 * ((values - values.mean()) ** 2).sum())
    assert float(found["channel_variance_stderr"][0, 0, 0]) == pytest.approx(expected, rel=1e-6)
    assert float(found["channel_variance"][0, 0, 0]) == pytest.approx(pooled.var(0).mean(), rel=1e-6)


def test_sequences_keep_their_own_error_and_pooled_tokens_get_the_jackknife(hc_run):
    plain = diagnostics.analyze(hc_run, metrics=["effective_rank", "dong_residual"])
    both = diagnostics.analyze(hc_run, metrics=["effective_rank", "dong_residual"], jackknife=True)
    xr.testing.assert_identical(plain["dong_residual_stderr"], both["dong_residual_stderr"])
    before, after = plain["effective_rank_stderr"], both["effective_rank_stderr"]
    xr.testing.assert_equal(before.sel(scope="sequence"), after.sel(scope="sequence"))
    assert before.sel(scope="data").isnull().all()
    assert after.sel(scope="data").notnull().all()
    assert "over the data: delete-one jackknife over 2 sequences" in after.attrs["estimator"]
    xr.testing.assert_equal(plain["effective_rank"], both["effective_rank"])


def test_what_is_left_out_is_a_whole_sequence_whatever_its_length(make_run):
    run = make_run("residual", layers=2, samples=4)  # the last sequence is padded
    trace = run["trace"].to_dataset().load()
    found = diagnostics.analyze(run, metrics=["participation_ratio"], jackknife=True)
    values = []
    for s in range(4):
        rest = trace.isel(sample=[i for i in range(4) if i != s])
        alone = diagnostics.analyze(schema.create_run(rest, attrs=run.attrs), metrics=["participation_ratio"])
        values.append(alone["participation_ratio"].sel(scope="data").values)
    expected = np.sqrt(3 / 4 * ((np.array(values) - np.mean(values, axis=0)) ** 2).sum(0))
    np.testing.assert_allclose(
        found["participation_ratio_stderr"].sel(scope="data").values, expected, rtol=1e-6
    )


def test_a_thinned_metric_leaves_out_of_the_tokens_that_it_took(monkeypatch, make_run):
    monkeypatch.setattr("depthscope.diagnostics.metrics.representation.ROWS", 40)
    run = make_run("residual", layers=1, samples=8, features=6)
    found = diagnostics.analyze(run, metrics=["joined_cka"], jackknife=True)
    real = np.argwhere(run.trace.mask.values)
    kept = real[evenly_spaced(len(real), 40)]
    x, y = (run.trace.residual.values[depth, kept[:, 0], kept[:, 1], 0].astype(float) for depth in (0, 1))
    without = [kept[:, 0] != s for s in range(8)]
    values = np.array([similarity.linear_cka(x[rest], y[rest], unbiased=True) for rest in without])
    expected = np.sqrt(7 / 8 * ((values - values.mean()) ** 2).sum())
    assert float(found["joined_cka_stderr"].sel(tokens="all")[0, 0, 1]) == pytest.approx(expected, rel=1e-6)


def test_every_smooth_metric_has_an_error_and_no_other(make_run):
    run = make_run("hc", layers=2, samples=3, features=12)
    found = diagnostics.analyze(run, metrics=CATALOGUE, jackknife=True)
    for name in set(CATALOGUE) & set(found.data_vars):
        assert (f"{name}_stderr" in found) == resampled(CATALOGUE[name]), name
        if f"{name}_stderr" in found:
            error = found[f"{name}_stderr"]
            assert error.dims == found[name].dims
            assert not (error < 0).any()
            assert "sequences" in error.attrs["estimator"]
            assert error.attrs["long_name"].endswith("standard error over sequences")
            if "reduction" in error.dims:
                assert error.sel(reduction=["median", "p1", "p99", "max"]).isnull().all()
                assert error.sel(reduction="mean").notnull().any()


def test_one_sequence_has_no_error_and_says_why(make_run):
    run = make_run("residual", layers=2, samples=1)
    found = diagnostics.analyze(run, metrics=["effective_rank", "cka"], jackknife=True)
    assert found["effective_rank_stderr"].isnull().all()
    assert "one sequence" in found["effective_rank_stderr"].attrs["undefined_because"]
    assert "cka_stderr" not in found
    assert "one sequence" in found.attrs["notes"]["standard errors"]
    alone = diagnostics.analyze(run, metrics=["cka"], jackknife=True)
    assert "one sequence" in alone.attrs["notes"]["standard errors"]


def test_only_pooled_tokens_are_measured_again(make_run, monkeypatch):
    run = make_run("residual", layers=1, samples=3)
    calls = []
    original = diagnostics.kernels.rank.singular_values
    monkeypatch.setattr(
        diagnostics.kernels.rank,
        "singular_values",
        lambda x, **how: calls.append(x.shape) or original(x, **how),
    )
    trace = run["trace"].to_dataset()
    jackknife(trace, [CATALOGUE["effective_rank"], CATALOGUE["dong_residual"], CATALOGUE["num_tokens"]])
    assert calls == [
        (2, n, 32) for n in (28, 28, 32) for _ in range(2)
    ]  # both depths at once; raw and centred
