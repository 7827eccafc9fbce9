"""Norms of states and gradients, growth from step to step, and whether samples pull one way, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from depthscope import CATALOGUE, diagnostics

NAMES = [name for name, metric in CATALOGUE.items() if metric.question == "propagation"]


@pytest.fixture(scope="module")
def analysis(mhc_run):
    names = [*NAMES, "gradient_rank", "residual_norm", "gradient_norm", "backward_gain"]
    return diagnostics.analyze(mhc_run, metrics=names).isel(step=0)


def view(run, name, stream):
    values = run.trace[name].values[:, run.trace.mask.values].astype(float)
    return values.mean(-2) if stream == "mean" else values[:, :, int(stream)]


@pytest.mark.parametrize("stream", ["mean", "1"])
def test_channel_statistics(analysis, mhc_run, stream):
    x, found = view(mhc_run, "residual", stream), analysis.sel(stream=stream)
    np.testing.assert_allclose(found["channel_variance"], x.var(1).mean(-1), rtol=1e-5)


@pytest.mark.parametrize("stream", ["mean", "3"])
def test_steps_relative_to_the_state(analysis, mhc_run, stream):
    x, found = view(mhc_run, "residual", stream), analysis.sel(stream=stream)
    size = np.linalg.norm(x, axis=-1)
    share = np.linalg.norm(np.diff(x, axis=0), axis=-1) / size[:-1]
    np.testing.assert_allclose(found["branch_share"][1:], share.mean(-1), rtol=1e-5)
    cosine = (x[1:] * x[:-1]).sum(-1) / size[1:] / size[:-1]
    np.testing.assert_allclose(found["adjacent_cosine"][1:], cosine.mean(-1), rtol=1e-5)
    band = np.quantile(cosine, [0.05, 0.5, 0.95], axis=-1).T
    np.testing.assert_allclose(found["adjacent_cosine_band"][1:], band, rtol=1e-5)
    assert analysis["adjacent_cosine_band"]["quantile"].values.tolist() == [0.05, 0.5, 0.95]
    assert found["adjacent_cosine_band"][0].isnull().all()


def test_independent_unit_branches_follow_the_closed_form(make_run):
    run = make_run("residual", layers=8, samples=4, tokens=64, features=512)
    found = diagnostics.analyze(run, metrics=NAMES).isel(step=0, stream=0)
    terms = np.arange(1, 9)
    np.testing.assert_allclose(found["adjacent_cosine"][1:], np.sqrt(terms / (terms + 1)), atol=3e-3)
    np.testing.assert_allclose(found["branch_share"][1:], terms**-0.5, rtol=0.02)
    np.testing.assert_allclose(found["channel_variance"], np.arange(1, 10), rtol=0.03)


def test_gradients_of_sequences(analysis, mhc_run):
    trace = mhc_run.trace
    g = np.where(trace.mask.values[..., None], trace.gradient.sum("stream").values.astype(float), 0).sum(2)
    found = analysis.sel(stream="mean")
    for depth in (0, 4):
        p = np.linalg.svd(g[depth], compute_uv=False)
        p = p / p.sum()
        assert float(found["gradient_rank"][depth]) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)


def test_a_single_sequence_has_a_rank(make_run):
    run = make_run("residual", layers=2, samples=1)
    found = diagnostics.analyze(run, metrics=["gradient_rank"])
    np.testing.assert_allclose(found["gradient_rank"], 1.0)


@pytest.mark.parametrize("stream", ["mean", "2"])
def test_norms_leave_padding_out(analysis, mhc_run, stream):
    trace, keep = mhc_run.trace, mhc_run.trace.mask.values

    def view(name):
        values = trace[name].values[:, keep].astype(float)
        joined = {"residual": values.mean(-2), "gradient": values.sum(-2)}
        return joined[name] if stream == "mean" else values[:, :, int(stream)]

    size = np.sqrt((view("residual") ** 2).sum(-1).mean(-1))
    np.testing.assert_allclose(analysis["residual_norm"].sel(stream=stream), size, rtol=1e-6)
    norm = np.sqrt((view("gradient") ** 2).sum((-1, -2)))
    np.testing.assert_allclose(analysis["gradient_norm"].sel(stream=stream), norm, rtol=1e-6)
    np.testing.assert_allclose(analysis["backward_gain"].sel(stream=stream), norm / norm[-1], rtol=1e-6)
    assert analysis["backward_gain"].sel(stream=stream)[-1] == 1.0


def test_a_zero_gradient_at_the_output_has_no_gain(make_run):
    run = make_run("residual", layers=2)
    trace = run["trace"].to_dataset().load()
    trace["gradient"].values[-1] = 0.0
    found = diagnostics.analyze(diagnostics.create_run(trace, attrs=run.attrs))
    assert found["backward_gain"].isnull().all()
    assert float(found["gradient_norm"][0, -1, 0]) == 0.0
