"""Gains, spectra and products of mixing matrices against numpy, matrix by matrix."""

from __future__ import annotations

import numpy as np
import pytest

from depthscope import diagnostics
from depthscope.diagnostics import schema
from depthscope.diagnostics.quantities.mixing_matrices import over_last

LEVELS = [0.5, 0.01, 0.99]


def reduced(values):
    """Reductions over tokens of values (C, N, ...)."""
    quantiles = [np.quantile(values, q, axis=1) for q in LEVELS]
    return np.stack([values.mean(1), *quantiles, values.max(1)], axis=-1)


@pytest.fixture(scope="module")
def analysis(hc_run):
    return diagnostics.analyze(hc_run)


@pytest.fixture(scope="module")
def matrices(hc_run):
    trace = hc_run.trace
    return trace.h_res.values[:, trace.mask.values].astype(float)


@pytest.fixture(scope="module")
def products(matrices):
    found = [matrices[0]]
    for h in matrices[1:]:
        found.append(h @ found[-1])
    return np.stack(found)


# Metric and its choices → what it is of the matrices (C, N, n, n), and of their products from the embedding on.
DEFINITIONS = {
    ("mixing_gain", "direction", "forward"): lambda h, p: np.abs(h.sum(-1)).max(-1),
    ("mixing_gain", "direction", "backward"): lambda h, p: np.abs(h.sum(-2)).max(-1),
    ("composite_gain", "direction", "forward"): lambda h, p: np.abs(p.sum(-1)).max(-1),
    ("composite_gain", "direction", "backward"): lambda h, p: np.abs(p.sum(-2)).max(-1),
    ("composite_attenuation", "direction", "forward"): lambda h, p: np.abs(p.sum(-1)).min(-1),
    ("composite_attenuation", "direction", "backward"): lambda h, p: np.abs(p.sum(-2)).min(-1),
    ("doubly_stochastic_violation", "kind", "row"): lambda h, p: np.abs(h.sum(-1) - 1).max(-1),
    ("doubly_stochastic_violation", "kind", "column"): lambda h, p: np.abs(h.sum(-2) - 1).max(-1),
    ("doubly_stochastic_violation", "kind", "negativity"): lambda h, p: np.maximum(-h, 0).max((-1, -2)),
    ("composite_operator_gain", "norm", "infinity"): lambda h, p: np.linalg.norm(p, np.inf, axis=(-2, -1)),
    ("composite_operator_gain", "norm", "one"): lambda h, p: np.linalg.norm(p, 1, axis=(-2, -1)),
    ("composite_operator_gain", "norm", "two"): lambda h, p: np.linalg.norm(p, 2, axis=(-2, -1)),
    ("identity_distance",): lambda h, p: np.linalg.norm(h - np.eye(4), axis=(-1, -2)) / 2,
    ("mixing_singular_value",): lambda h, p: np.linalg.svd(h, compute_uv=False),
    ("composite_singular_value",): lambda h, p: np.linalg.svd(p, compute_uv=False),
    ("mixing_eigenvalue_modulus",): lambda h, p: -np.sort(-np.abs(np.linalg.eigvals(h)), axis=-1),
}


@pytest.mark.parametrize("metric", DEFINITIONS, ids=" ".join)
def test_a_metric_of_the_mixing_is_what_numpy_gives(analysis, matrices, products, metric):
    name, *choice = metric
    found = analysis[name].isel(step=0).sel(dict([choice]) if choice else {})
    np.testing.assert_allclose(found, reduced(DEFINITIONS[metric](matrices, products)), rtol=1e-8)


def test_what_is_left_of_the_differences(mhc_run):
    found = diagnostics.analyze(mhc_run, metrics=["deflated_gain"])["deflated_gain"]
    h = mhc_run.trace.h_res.values[:, mhc_run.trace.mask.values].astype(float)
    product = h[0]
    for later in h[1:]:
        product = later @ product
    left = np.linalg.svd(product - 0.25, compute_uv=False)[:, 0]
    assert float(found.sel(reduction="mean")[0, -1]) == pytest.approx(left.mean(), rel=1e-4)


def test_reductions_between_infinities_take_the_nearest_rank():
    values = np.array([-np.inf, -np.inf, 0.0, 1.0, np.inf])
    assert over_last(values)[1:].tolist() == [0.0, -np.inf, np.inf, np.inf]
    finite = np.random.default_rng(0).normal(size=(3, 1001))
    expected = [finite.mean(1), *(np.quantile(finite, q, axis=1) for q in LEVELS), finite.max(1)]
    np.testing.assert_allclose(over_last(finite), np.stack(expected, axis=-1), rtol=1e-12)
    assert np.isnan(over_last(np.array([1.0, np.nan, 2.0]))).all()


def test_shares_add_to_one_and_leave_the_mean_out(analysis, hc_run):
    weights = np.abs(hc_run.trace.h_pre.values[:, hc_run.trace.mask.values].astype(float)).sum(1)
    found = analysis["read_share"].isel(step=0)
    np.testing.assert_allclose(
        found.sel(stream=list("0123")), weights / weights.sum(1, keepdims=True), rtol=1e-9
    )
    assert found.sel(stream="mean").isnull().all()
    np.testing.assert_allclose(analysis["write_share"].isel(step=0).sum("stream"), 1.0)
    np.testing.assert_allclose(analysis["read_share_null"], 0.25)


def static_run(make_run, matrices, family="hc"):
    """A run whose connections are these matrices for every token."""
    matrices = np.asarray(matrices, float)
    count, n = matrices.shape[:2]
    run = make_run(family, layers=(count + 1) // 2, tokens=6, features=8, streams=n)
    trace = run["trace"].to_dataset().load().isel(connection=slice(0, count))
    trace["h_res"].values[:] = matrices[:, None, None]
    return schema.create_run(trace, attrs=run.attrs)


def test_one_broken_connection_leaves_the_others(make_run):
    matrices = np.stack([np.eye(2) * 2.0] * 6)
    matrices[3] = np.nan
    found = diagnostics.analyze(static_run(make_run, matrices))
    single = found["mixing_gain"].sel(direction="forward", reduction="mean").values[0]
    np.testing.assert_allclose(single, [2, 2, 2, np.nan, 2, 2])
    composed = found["composite_gain"].sel(direction="forward", reduction="mean").values[0]
    np.testing.assert_allclose(composed, [2, 4, 8, np.nan, np.nan, np.nan])
    assert "connection 3" in found.attrs["not_computed"]["depth_kernel"]
