"""Connections as operators and the paths through them, against numpy, matrix by matrix."""

from __future__ import annotations

import numpy as np
import pytest

from depthscope import CATALOGUE, diagnostics
from depthscope.diagnostics import schema

NAMES = [
    name for name, metric in CATALOGUE.items() if metric.question in ("operators", "contraction", "paths")
]


def test_a_plain_residual_network_gives_the_nulls(make_run):
    run = make_run("hc", layers=3)
    trace = run["trace"].to_dataset().load()
    trace["h_res"].values[:] = np.eye(4)
    trace["h_pre"].values[:] = 0.25
    trace["h_post"].values[:] = 1.0
    found = diagnostics.analyze(schema.create_run(trace, attrs=run.attrs), metrics=NAMES).isel(step=0)
    np.testing.assert_allclose(found["depth_kernel"], np.tri(6, k=-1))
    # Its streams are copies, of which one signal passes; random gates pass a little more.
    np.testing.assert_allclose(found["effective_streams"].sel(reduction="max")[1:], 1.0, atol=1e-6)


@pytest.mark.parametrize(("streams", "low", "high"), [(2, 1.2, 1.4), (4, 1.4, 1.65), (8, 1.5, 1.85)])
def test_random_gates_are_the_null_of_the_effective_streams(make_run, streams, low, high):
    """Gates of logits with a standard deviation of 1, without mixing, pass hardly more than one signal."""
    run = make_run("hc", layers=24, tokens=4, features=8, streams=streams)
    null = diagnostics.analyze(run, metrics="effective_streams")["effective_streams_null"].values
    assert np.isnan(null[0])
    assert low < np.median(null[1:]) < high


def test_a_connection_that_is_not_finite_is_undefined(make_run):
    run = make_run("hc", layers=2)
    trace = run["trace"].to_dataset().load()
    trace["h_res"].values[2, 0, 3, 1, 1] = np.nan
    found = diagnostics.analyze(schema.create_run(trace, attrs=run.attrs), metrics=NAMES).isel(step=0)
    assert found["composite_operator_gain"].isel(connection=[0, 1]).notnull().all()
    assert found["composite_operator_gain"].isel(connection=[2, 3]).isnull().all()
    assert found["effective_streams"].isel(connection=1).notnull().all()
    assert found["effective_streams"].isel(connection=[2, 3]).isnull().all()
    assert "not finite at connection 2" in found.attrs["not_computed"]["depth_kernel"]


def test_the_signal_read_of_a_stream_is_its_weight_times_its_size(make_run):
    run = make_run("hc", layers=3)
    trace = run["trace"].to_dataset().load()
    trace["residual"].values[..., 1, :] *= 7.0
    found = diagnostics.analyze(schema.create_run(trace, attrs=run.attrs), metrics="signal_share").isel(
        step=0
    )
    mask, connection = trace["mask"].values, 4
    depth = int(trace["depth_in"][connection])
    sizes = np.linalg.norm(trace["residual"].values[depth].astype(float), axis=-1)[mask]
    signal = (np.abs(trace["h_pre"].values[connection][mask]) * sizes).sum(0)
    np.testing.assert_allclose(found["signal_share"][connection], signal / signal.sum(), rtol=1e-5)
