"""Norms of states and gradients against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from depthscope import diagnostics


@pytest.fixture(scope="module")
def analysis(mhc_run):
    return diagnostics.analyze(mhc_run, metrics=["residual_norm", "gradient_norm", "backward_gain"])


@pytest.mark.parametrize("stream", ["mean", "2"])
def test_norms_leave_padding_out(analysis, mhc_run, stream):
    trace, keep = mhc_run.trace, mhc_run.trace.mask.values

    def view(name):
        values = trace[name].values[:, keep].astype(float)
        joined = {"residual": values.mean(-2), "gradient": values.sum(-2)}
        return joined[name] if stream == "mean" else values[:, :, int(stream)]

    size = np.sqrt((view("residual") ** 2).sum(-1).mean(-1))
    np.testing.assert_allclose(analysis["residual_norm"].sel(stream=stream)[0], size, rtol=1e-6)
    norm = np.sqrt((view("gradient") ** 2).sum((-1, -2)))
    np.testing.assert_allclose(analysis["gradient_norm"].sel(stream=stream)[0], norm, rtol=1e-6)
    np.testing.assert_allclose(analysis["backward_gain"].sel(stream=stream)[0], norm / norm[-1], rtol=1e-6)
    assert analysis["backward_gain"].sel(stream=stream)[0, -1] == 1.0


def test_a_zero_gradient_at_the_output_has_no_gain(make_run):
    run = make_run("residual", layers=2)
    trace = run["trace"].to_dataset().load()
    trace["gradient"].values[-1] = 0.0
    found = diagnostics.analyze(diagnostics.create_run(trace, attrs=run.attrs))
    assert found["backward_gain"].isnull().all()
    assert float(found["gradient_norm"][0, -1, 0]) == 0.0
