"""Similarities between depths: of the mean, of joined streams, of each, without large features; against numpy and kernels."""

from __future__ import annotations

import numpy as np
import pytest

from depthscope import diagnostics
from depthscope.diagnostics.kernels import similarity as kernel
from tests.diagnostics.state_runs import run_of


@pytest.fixture(scope="module")
def analysis(hc_run):
    return diagnostics.analyze(hc_run)


@pytest.fixture(scope="module")
def mean_states(hc_run):
    trace = hc_run.trace
    return trace.residual.mean("stream").values[:, trace.mask.values].astype(float)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_of_the_mean_over_streams(analysis, mean_states, unbiased):
    expected = float(kernel.linear_cka(mean_states[2], mean_states[5], unbiased=unbiased))
    found = analysis["cka"].sel(estimator="unbiased" if unbiased else "biased", tokens="all").isel(step=0)
    assert float(found[2, 5]) == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(found, found.T, atol=1e-12)
    np.testing.assert_allclose(np.diag(found), 1.0)


def test_adjacent_cka_is_the_first_subdiagonal(analysis):
    table, adjacent = analysis["cka"].isel(step=0), analysis["adjacent_cka"].isel(step=0)
    assert adjacent.isel(depth=0).isnull().all()
    for depth in range(1, table.sizes["depth"]):
        found = adjacent.isel(depth=depth).values
        np.testing.assert_array_equal(found, table.isel(depth=depth, other_depth=depth - 1).values)


def test_angles_and_block_influence(analysis, mean_states):
    x, y = mean_states[3], mean_states[4]
    cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    angles = analysis["angular_distance"].sel(tokens="all").isel(step=0)
    assert float(angles[3, 4]) == pytest.approx(np.arccos(cosine).mean() / np.pi, rel=1e-5)
    np.testing.assert_array_equal(np.diag(angles), 0.0)
    influence = analysis["block_influence"].sel(tokens="all").isel(step=0)
    assert float(influence[4]) == pytest.approx((1 - cosine).mean(), rel=1e-5)
    assert np.isnan(influence[0])


def test_stream_cosine_is_the_mean_over_pairs_of_streams(analysis, hc_run):
    trace = hc_run.trace
    streams = trace.residual.values[6][trace.mask.values].astype(float)
    unit = streams / np.linalg.norm(streams, axis=-1, keepdims=True)
    pairs = np.einsum("tid,tjd->tij", unit, unit)[:, ~np.eye(4, dtype=bool)]
    assert float(analysis["stream_cosine"][0, 6]) == pytest.approx(pairs.mean(), rel=1e-6)
    assert float(analysis["stream_cosine"][0, 0]) == pytest.approx(1.0)


# --- joined streams, each stream, and without large features


NAMES = ("joined_cka", "least_stream_cka", "trimmed_cka")
DEPTHS, SAMPLES, TOKENS, STREAMS, FEATURES = 4, 3, 30, 3, 8


def random_states(seed=0, streams=STREAMS):
    return np.random.default_rng(seed).normal(size=(DEPTHS, SAMPLES, TOKENS, streams, FEATURES))


def tables(states):
    found = diagnostics.analyze(run_of(states), metrics=["cka", *NAMES])
    return {
        name: found[name]
        .sel(
            {
                dim: label
                for dim, label in (("estimator", "unbiased"), ("tokens", "all"))
                if dim in found[name].dims
            }
        )
        .squeeze(drop=True)
        .values
        for name in ("cka", *NAMES)
    }


def test_of_one_stream_without_large_features_all_views_are_the_cka():
    found = tables(random_states(streams=1))
    for name in NAMES[:3]:
        np.testing.assert_allclose(found[name], found["cka"], atol=1e-6)


def test_streams_are_joined_and_each_is_compared_with_itself():
    states = random_states()
    states[1:, ..., 0, :] = states[0, ..., 0, :]  # one stream stays
    found = tables(states)
    rows = states.reshape(DEPTHS, -1, STREAMS, FEATURES)
    for a, b in ((0, 1), (1, 3)):
        joined = kernel.linear_cka(
            rows[a].reshape(len(rows[a]), -1), rows[b].reshape(len(rows[b]), -1), unbiased=True
        )
        each = [kernel.linear_cka(rows[a][:, n], rows[b][:, n], unbiased=True) for n in range(STREAMS)]
        assert found["joined_cka"][a, b] == pytest.approx(float(joined), abs=1e-5)
        assert found["least_stream_cka"][a, b] == pytest.approx(min(map(float, each)), abs=1e-5)
        assert max(map(float, each)) == pytest.approx(1.0)


def test_a_large_feature_is_all_that_cka_sees_until_it_is_left_out():
    states = random_states(streams=1)
    large = np.random.default_rng(2).normal(size=states.shape[1:4]) * 100
    states[..., 5] = large
    found = tables(states)
    assert found["cka"].min() > 0.99
    off = ~np.eye(DEPTHS, dtype=bool)
    rest = np.delete(states, 5, axis=-1).reshape(DEPTHS, -1, FEATURES - 1)
    expected = kernel.cka_matrix(rest, unbiased=True)
    np.testing.assert_allclose(found["trimmed_cka"], expected, atol=1e-5)
    assert np.abs(found["trimmed_cka"][off]).max() < 0.3


def test_a_stream_of_zeros_has_no_cka_and_the_joined_state_has():
    states = random_states()
    states[..., 2, :] = 0
    found = tables(states)
    assert np.isnan(found["least_stream_cka"]).all()
    assert np.isfinite(found["joined_cka"]).all()
