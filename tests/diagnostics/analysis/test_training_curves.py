"""Training curves from the additive statistics agree with the definitions on the states that were seen."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from depthscope import diagnostics
from depthscope.diagnostics import schema


def statistics_of(run, steps):
    """The exact statistics of a run's trace, as if each step had seen it scaled by its number."""
    trace, keep = run.trace, run.trace.mask.values
    states = np.moveaxis(trace.residual.values[:, keep].astype(float), 1, 2)
    gradients = np.moveaxis(trace.gradient.values[:, keep].astype(float), 1, 2)
    norms = np.linalg.norm(states, axis=-1)
    unit = states / norms[..., None]
    adjacent = np.full(norms.shape, np.nan)
    adjacent[1:] = (unit[1:] * unit[:-1]).sum(-1)
    scale = np.array(steps, float)[:, None, None]
    count = keep.sum()
    pair = np.square(unit.sum(-2)).sum(-1) - count
    profile = schema.PROFILE
    variables = {
        "token_count": ("step", np.full(len(steps), float(count))),
        "loss": ("step", 1 / np.array(steps, float)),
        "square_norm_sum": (profile, np.square(norms).sum(-1) * scale**2),
        "unit_pair_sum": (profile, np.broadcast_to(pair, (len(steps), *pair.shape))),
        "adjacent_cosine_sum": (profile, np.broadcast_to(adjacent.sum(-1), (len(steps), *pair.shape))),
        "gradient_square_norm_sum": (profile, np.square(gradients).sum((-1, -2)) * scale**2),
    }
    coords = {"step": steps, "depth": trace["depth"].values, "stream": np.arange(states.shape[1])}
    if "h_res" in trace:
        h = trace.h_res.values[:, keep].astype(float)
        gain = np.stack([np.abs(h.sum(-1)).max(-1), np.abs(h.sum(-2)).max(-1)])
        whole = (len(steps), *gain.shape[:2])
        variables["gain_sum"] = (schema.GAIN, np.broadcast_to(gain.sum(-1), whole))
        variables["gain_max"] = (schema.GAIN, np.broadcast_to(gain.max(-1), whole))
        coords |= {"connection": np.arange(len(h)), "direction": ["forward", "backward"]}
    return xr.Dataset(variables, coords)


@pytest.fixture(scope="module", params=["residual", "hc"])
def pair(request, make_run):
    run = make_run(request.param, layers=3)
    return run, schema.create_run(None, statistics=statistics_of(run, [1, 5, 9]), attrs=run.attrs)


def test_curves_equal_the_metrics_of_the_trace(pair):
    run, recorded = pair
    curves, analysis = diagnostics.training_curves(recorded), diagnostics.analyze(run)
    streams = [s for s in analysis["stream"].values.tolist() if s != "mean"] or ["mean"]
    first = curves.isel(step=0).sel(stream=streams)
    expected = analysis.isel(step=0).sel(stream=streams)
    for name in ("residual_norm", "gradient_norm", "backward_gain"):
        np.testing.assert_allclose(first[name], expected[name], rtol=1e-6)
        assert curves[name].dims == ("step", "depth", "stream")
    np.testing.assert_allclose(curves["residual_norm"].isel(step=2), 9 * curves["residual_norm"].isel(step=0))
    pick = {"scope": "data", "tokens": "all", "centering": "raw"}
    np.testing.assert_allclose(first["token_cosine"].sel(pick), expected["token_cosine"].sel(pick), atol=1e-9)
    assert curves["loss"].values.tolist() == [1.0, 0.2, 1 / 9]
    assert curves["residual_norm"].attrs["estimator"] == "exact over every token of the step"
    if len(streams) == 1:
        influence = expected["block_influence"].sel(tokens="all")
        np.testing.assert_allclose(1 - first["adjacent_cosine"].squeeze(), influence, atol=1e-9)
    else:
        gain = expected["mixing_gain"].sel(reduction=["mean", "max"])
        np.testing.assert_allclose(first["mixing_gain"], gain, rtol=1e-6)


def test_a_run_without_a_trace_is_analysed_by_its_curves(pair):
    _, recorded = pair
    found = diagnostics.analyze(recorded)
    assert found.sizes["step"] == 3
    assert {"residual_norm", "token_cosine", "loss"} <= set(found.data_vars)
    assert "has no trace" in found.attrs["not_computed"]["effective_rank"]
    assert "residual_norm" not in found.attrs["not_computed"]
    assert [finding.severity.name for finding in diagnostics.judge(found)] == []


def test_only_the_chosen_curves_are_given(pair):
    found = diagnostics.analyze(pair[1], metrics=["gradient_norm"])
    assert set(found.data_vars) & set(diagnostics.CATALOGUE) == {"gradient_norm"}


def test_a_run_without_statistics_says_so(make_run):
    with pytest.raises(ValueError, match="has no statistics"):
        diagnostics.training_curves(make_run("residual", layers=2, weights=False))
