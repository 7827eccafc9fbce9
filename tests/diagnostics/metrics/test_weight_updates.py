"""Norms of weights, gradients and updates: closed forms, the last step of a run, curves over all of them, verdicts."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from depthscope import CATALOGUE, diagnostics
from depthscope.diagnostics import schema

NAMES = [name for name, metric in CATALOGUE.items() if metric.question == "weight_updates"]
SQUARES = {
    "weight_square_norm": [[4.0, 25.0, 0.0], [16.0, 36.0, 0.0]],
    "weight_gradient_square_norm": [[1.0, np.nan, 9.0], [9.0, np.nan, 9.0]],
    "weight_update_square_norm": [[np.nan, np.nan, np.nan], [0.04, 0.0, 1.0]],
}


def statistics_of(squares):
    variables = {name: (schema.MOTION, np.array(values)) for name, values in squares.items()}
    variables |= {"token_count": ("step", [8.0, 8.0]), "weight_count": ("weight", [10.0, 20.0, 5.0])}
    paths = np.array(["embed", "blocks.0.up", "head"], dtype=object)
    coords = {"step": [3, 7], "weight": paths, "weight_layer": ("weight", [-1, 0, -1])}
    return xr.Dataset(variables, coords)


@pytest.fixture(scope="module")
def run(make_run):
    plain = make_run("residual", layers=2, weights=False)
    trace = plain["trace"].to_dataset()
    return schema.create_run(trace, statistics=statistics_of(SQUARES), attrs=plain.attrs)


def test_an_analysis_holds_the_last_step(run):
    found = diagnostics.analyze(run, metrics=NAMES)
    expected = {
        "weight_norm": [4.0, 6.0, 0.0],
        "weight_gradient_norm": [3.0, np.nan, 3.0],
        "update_ratio": [0.05, 0.0, np.nan],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].values, [values], err_msg=name)
    assert found["weight"].values.tolist() == ["embed", "blocks.0.up", "head"]
    assert found["weight_layer"].values.tolist() == [-1, 0, -1]


@pytest.mark.parametrize("name", NAMES)
def test_curves_hold_every_step(run, name):
    curves = diagnostics.training_curves(run)
    assert curves[name].dims == ("step", "weight")
    assert curves["step"].values.tolist() == [3, 7]
    last = diagnostics.analyze(run, metrics=[name])[name].isel(step=0)
    np.testing.assert_array_equal(curves[name].isel(step=1), last)
    assert curves[name].attrs["units"] == CATALOGUE[name].units


def test_a_run_a_node_and_arrays_agree(run):
    whole = diagnostics.update_ratio(run)
    assert whole.dims == ("weight",)
    statistics = run["statistics"]
    history = diagnostics.update_ratio(statistics)
    xr.testing.assert_identical(history.isel(step=1, drop=True), whole)
    moved, size = statistics.weight_update_square_norm, statistics.weight_square_norm
    xr.testing.assert_allclose(diagnostics.update_ratio(moved, size), history)
    one = diagnostics.update_ratio(moved.isel(step=1), size.isel(step=1))
    assert one.dims == ("weight",)


def test_a_run_without_weights_says_how_to_record_them(make_run):
    found = diagnostics.analyze(make_run("residual", layers=2, weights=False), metrics=NAMES)
    assert all("weights=True" in found.attrs["not_computed"][name] for name in NAMES)


def judged(ratios):
    squares = dict(SQUARES, weight_square_norm=[[1.0] * 3] * 2)
    squares["weight_update_square_norm"] = [[1e-6] * 3, np.square(ratios)]
    only = schema.create_run(None, statistics=statistics_of(squares), attrs={"model": "m"})
    found = diagnostics.judge(diagnostics.analyze(only))
    return {each.verdict: each for each in found if each.metric == "update_ratio"}


def test_healthy_updates_are_passed_over():
    assert judged([1e-3, 1e-4, 1e-2]) == {}


def test_where_no_optimizer_ran_nothing_is_said():
    assert judged([np.nan, np.nan, np.nan]) == {}
