"""Gains, spectra and products of mixing matrices against numpy, matrix by matrix."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.published import figure_8
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


def gains(p):
    return {"forward": np.abs(p.sum(-1)).max(-1), "backward": np.abs(p.sum(-2)).max(-1)}


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_gains_single_and_composed(analysis, matrices, products, direction):
    for name, p in (("mixing_gain", matrices), ("composite_gain", products)):
        found = analysis[name].sel(direction=direction).isel(step=0)
        np.testing.assert_allclose(found, reduced(gains(p)[direction]), rtol=1e-10)


def test_attenuation_is_the_weakest_sum(analysis, products):
    found = analysis["composite_attenuation"].isel(step=0)
    np.testing.assert_allclose(
        found.sel(direction="forward"), reduced(np.abs(products.sum(-1)).min(-1)), rtol=1e-9
    )
    np.testing.assert_allclose(
        found.sel(direction="backward"), reduced(np.abs(products.sum(-2)).min(-1)), rtol=1e-9
    )


def test_spectra(analysis, matrices, products):
    singular = np.linalg.svd(matrices, compute_uv=False)
    composed = np.linalg.svd(products, compute_uv=False)
    moduli = -np.sort(-np.abs(np.linalg.eigvals(matrices)), axis=-1)
    for name, values in (
        ("mixing_singular_value", singular),
        ("composite_singular_value", composed),
        ("mixing_eigenvalue_modulus", moduli),
    ):
        np.testing.assert_allclose(analysis[name].isel(step=0), reduced(values), rtol=1e-8)


def test_reductions_between_infinities_take_the_nearest_rank():
    values = np.array([-np.inf, -np.inf, 0.0, 1.0, np.inf])
    assert over_last(values)[1:].tolist() == [0.0, -np.inf, np.inf, np.inf]
    finite = np.random.default_rng(0).normal(size=(3, 1001))
    expected = [finite.mean(1), *(np.quantile(finite, q, axis=1) for q in LEVELS), finite.max(1)]
    np.testing.assert_allclose(over_last(finite), np.stack(expected, axis=-1), rtol=1e-12)
    assert np.isnan(over_last(np.array([1.0, np.nan, 2.0]))).all()


def test_violation_and_distance(analysis, matrices):
    found = analysis["doubly_stochastic_violation"].isel(step=0)
    np.testing.assert_allclose(
        found.sel(kind="row"), reduced(np.abs(matrices.sum(-1) - 1).max(-1)), rtol=1e-9
    )
    np.testing.assert_allclose(
        found.sel(kind="column"), reduced(np.abs(matrices.sum(-2) - 1).max(-1)), rtol=1e-9
    )
    np.testing.assert_allclose(
        found.sel(kind="negativity"), reduced(np.maximum(-matrices, 0).max((-1, -2))), rtol=1e-9
    )
    distance = np.linalg.norm(matrices - np.eye(4), axis=(-1, -2)) / 2
    np.testing.assert_allclose(analysis["identity_distance"].isel(step=0), reduced(distance), rtol=1e-9)


def test_what_is_left_of_the_differences(mhc_run):
    found = diagnostics.analyze(mhc_run, metrics=["deflated_gain"])["deflated_gain"]
    h = mhc_run.trace.h_res.values[:, mhc_run.trace.mask.values].astype(float)
    product = h[0]
    for later in h[1:]:
        product = later @ product
    left = np.linalg.svd(product - 0.25, compute_uv=False)[:, 0]
    assert float(found.sel(reduction="mean")[0, -1]) == pytest.approx(left.mean(), rel=1e-4)


def test_depth_kernel_by_loops(analysis, hc_run, matrices):
    trace = hc_run.trace
    keep = trace.mask.values
    reads, writes = trace.h_pre.values[:, keep].astype(float), trace.h_post.values[:, keep].astype(float)
    found = analysis["depth_kernel"].isel(step=0).values
    expected = np.zeros_like(found)
    for reader in range(len(found)):
        for source in range(reader):
            carried = writes[source]
            for between in range(source + 1, reader):
                carried = np.einsum("tij,tj->ti", matrices[between], carried)
            expected[reader, source] = np.abs((reads[reader] * carried).sum(1)).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


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


def test_deep_products_overflow_to_infinity(make_run):
    found = diagnostics.analyze(static_run(make_run, [1e38 * np.eye(2)] * 10), metrics=["composite_gain"])
    gain = found["composite_gain"].sel(direction="forward", reduction="mean").values[0]
    np.testing.assert_allclose(np.log10(gain[:8]), 38 * np.arange(1, 9), rtol=1e-6)
    assert np.isinf(gain[8:]).all()


def test_one_broken_connection_leaves_the_others(make_run):
    matrices = np.stack([np.eye(2) * 2.0] * 6)
    matrices[3] = np.nan
    found = diagnostics.analyze(static_run(make_run, matrices))
    single = found["mixing_gain"].sel(direction="forward", reduction="mean").values[0]
    np.testing.assert_allclose(single, [2, 2, 2, np.nan, 2, 2])
    composed = found["composite_gain"].sel(direction="forward", reduction="mean").values[0]
    np.testing.assert_allclose(composed, [2, 4, 8, np.nan, np.nan, np.nan])
    assert "connection 3" in found.attrs["not_computed"]["depth_kernel"]


@pytest.mark.parametrize("family", ["HC", "mHC"])
def test_the_published_matrices_compose_with_the_later_one_left(make_run, family):
    printed = figure_8.matrices(family)
    halves, whole = [printed["P1-30"], printed["P31-60"]], printed["P1-60"]

    def sums(matrices):
        found = diagnostics.analyze(
            static_run(make_run, matrices), metrics=["composite_gain", "composite_attenuation"]
        )
        pick = found.sel(reduction="mean").isel(step=0, connection=1)
        return np.concatenate([pick["composite_gain"].values, pick["composite_attenuation"].values])

    rows, columns = np.abs(whole.sum(1)), np.abs(whole.sum(0))
    expected = np.array([rows.max(), columns.max(), rows.min(), columns.min()])
    assert np.abs(sums(halves) / expected - 1).max() < 0.1
    assert np.abs(sums(halves[::-1]) / expected - 1).max() > 0.1
