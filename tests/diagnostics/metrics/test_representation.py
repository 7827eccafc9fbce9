"""CKA of joined streams, of each stream, and without large features, against numpy's formulas."""

from __future__ import annotations

import numpy as np
import pytest

from depthscope import diagnostics
from depthscope.diagnostics.kernels import similarity as kernel
from tests.diagnostics.state_runs import run_of

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


def test_streams_that_change_against_each_other_are_seen_where_their_mean_stays():
    states = random_states()
    change = np.random.default_rng(1).normal(size=(*states.shape[:3], FEATURES)) * 3
    mean = states[0].mean(axis=2, keepdims=True)
    states = np.broadcast_to(mean, states.shape).copy()
    states[..., 0, :] += change
    states[..., 1, :] -= change
    found = tables(states)
    assert found["cka"].min() > 0.999
    assert found["joined_cka"][0, 1:].max() < 0.5
    assert found["least_stream_cka"][0, 1:].max() < 0.5


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
