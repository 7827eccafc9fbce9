"""Similarities between depths against formulas written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from depthscope import diagnostics


@pytest.fixture(scope="module")
def analysis(hc_run):
    return diagnostics.analyze(hc_run)


@pytest.fixture(scope="module")
def mean_states(hc_run):
    trace = hc_run.trace
    return trace.residual.mean("stream").values[:, trace.mask.values].astype(float)


def hsic(k, q, unbiased):
    n = len(k)
    if not unbiased:
        h = np.eye(n) - 1 / n
        return np.trace(k @ h @ q @ h)
    k, q = k - np.diag(np.diag(k)), q - np.diag(np.diag(q))
    terms = np.trace(k @ q) + k.sum() * q.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * (k @ q).sum()
    return terms / (n * (n - 3))


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_of_the_mean_over_streams(analysis, mean_states, unbiased):
    x, y = mean_states[2], mean_states[5]
    k, q = x @ x.T, y @ y.T
    expected = hsic(k, q, unbiased) / np.sqrt(hsic(k, k, unbiased) * hsic(q, q, unbiased))
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


def test_independent_unit_branches_follow_the_closed_form(make_run):
    run = make_run("residual", layers=12, samples=4, tokens=64, features=512)
    found = diagnostics.analyze(run, metrics=["block_influence", "residual_norm"])
    steps = np.arange(1, 13)
    expected = 1 - np.sqrt(steps / (steps + 1))
    np.testing.assert_allclose(found["block_influence"].sel(tokens="all").values[0, 1:], expected, atol=3e-3)
    norms = found["residual_norm"].values[0, :, 0]
    np.testing.assert_allclose(norms**2 / 512, np.arange(1, 14), rtol=0.02)
