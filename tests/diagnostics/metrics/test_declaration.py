"""A metric called on labelled data keeps its labels, takes options by name and says what it does not know."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from depthscope import diagnostics
from depthscope.diagnostics import kernels


def test_an_array_gives_the_plain_number_by_depth(residual_run):
    residual, mask = residual_run.trace.residual, residual_run.trace.mask
    found = diagnostics.effective_rank(residual, mask=mask)
    assert found.dims == ("depth", "stream")
    assert found["site"].values.tolist() == residual["site"].values.tolist()
    assert found.attrs["symbol"] == r"\mathrm{erank}"
    first = [x[m] for x, m in zip(residual.values[3, :, :, 0], mask.values, strict=True)]
    expected = np.mean([_effective_rank(x) for x in first])
    assert float(found[3, 0]) == pytest.approx(expected, rel=1e-6)


def _effective_rank(x):
    s = np.linalg.svd(np.asarray(x, float), compute_uv=False)
    p = s / s.sum()
    return np.exp(-(p[p > 0] * np.log(p[p > 0])).sum())


@pytest.mark.parametrize(("scope", "center"), [("data", False), ("sequence", True)])
def test_options_choose_the_variant(mhc_run, scope, center):
    residual, mask = mhc_run.trace.residual, mhc_run.trace.mask
    found = diagnostics.effective_rank(residual, mask=mask, scope=scope, center=center)
    pick = {"scope": scope, "tokens": "all", "centering": "centred" if center else "raw"}
    whole = diagnostics.analyze(mhc_run, metrics=["effective_rank"])["effective_rank"]
    xr.testing.assert_allclose(found, whole.sel(pick).isel(step=0, drop=True), rtol=1e-12)


def test_a_slice_keeps_its_scalar_labels(residual_run):
    part = residual_run.trace.residual.isel(depth=2, stream=0)
    found = diagnostics.token_cosine(part)
    assert found.dims == ()
    assert int(found["depth"]) == 2
    whole = diagnostics.token_cosine(residual_run.trace.residual)
    assert float(found) == pytest.approx(float(whole[2, 0]))


def test_a_bare_matrix_equals_the_kernel():
    x = xr.DataArray(np.random.default_rng(0).standard_normal((20, 7)), dims=("token", "feature"))
    assert float(diagnostics.effective_rank(x)) == pytest.approx(float(kernels.rank.effective_rank(x.values)))


def test_a_run_a_trace_and_a_node_agree(hc_run):
    from_run = diagnostics.composite_gain(hc_run)
    assert from_run.dims == ("direction", "connection", "reduction")
    xr.testing.assert_identical(from_run, diagnostics.composite_gain(hc_run["trace"]))
    xr.testing.assert_identical(from_run, diagnostics.composite_gain(hc_run["trace"].to_dataset()))
    xr.testing.assert_allclose(
        from_run, diagnostics.composite_gain(hc_run.trace.h_res, mask=hc_run.trace.mask)
    )


def test_a_gradient_may_be_measured_as_a_state(residual_run):
    found = diagnostics.effective_rank(residual_run.trace.gradient)
    assert (found > 1).all()


def test_several_arrays_go_by_order_or_by_name(hc_run):
    trace = hc_run.trace
    by_order = diagnostics.depth_kernel(trace.h_res, trace.h_pre, trace.h_post)
    by_name = diagnostics.depth_kernel(h_post=trace.h_post, h_pre=trace.h_pre, h_res=trace.h_res)
    xr.testing.assert_identical(by_order, by_name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: diagnostics.effective_rank(t.residual, flavour=1), "knows center, mask"),
        (
            lambda t: diagnostics.effective_rank(t.residual, scope="world"),
            "expected one of 'sequence', 'data'",
        ),
        (lambda t: diagnostics.effective_rank(t.residual, direction="forward"), "has no direction"),
        (lambda t: diagnostics.effective_rank(t.residual.rename(depth="level")), "dims level"),
        (lambda t: diagnostics.effective_rank(t.residual, t.residual), "got 2 arrays"),
        (lambda t: diagnostics.effective_rank(), "got nothing"),
        (lambda t: diagnostics.effective_rank(np.eye(3)), "got ndarray"),
        (lambda t: diagnostics.effective_rank(t.residual, mask=np.ones((2, 2), bool)), "expected booleans"),
        (lambda t: diagnostics.mixing_gain(t), "needs more than one stream; this run has one"),
    ],
)
def test_what_is_not_known_is_refused(residual_run, call, message):
    with pytest.raises(ValueError, match=message):
        call(residual_run.trace)


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'efective_rank'"):
        diagnostics.efective_rank  # noqa: B018
