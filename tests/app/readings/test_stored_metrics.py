"""Metrics that are measured again replace the stored ones of the same trace; everything else stays."""

from __future__ import annotations

import xarray as xr

from depthscope.app.readings.readings import COMPLETE
from depthscope.app.readings.run_arrays import renewed
from depthscope.diagnostics import analyze


def test_what_was_measured_again_is_new_and_the_rest_is_old(whole_run, whole):
    stored = whole["plain"] * 0 + 7.0
    fresh = analyze(whole_run["plain"], metrics="residual_norm")
    again = renewed(fresh, stored.assign_attrs(not_computed={}), complete=False)
    xr.testing.assert_equal(
        again["residual_norm"].drop_vars("scope", errors="ignore"), fresh["residual_norm"]
    )
    assert (again["token_cosine"].dropna("depth", how="all") == 7.0).any()


def test_a_metric_that_can_be_fed_no_more_gives_its_reason(whole_run, whole):
    bare = analyze(whole_run["plain"], metrics="mixing_gain")
    stored = whole["plain"].assign(mixing_gain=whole["plain"]["residual_norm"], mixing_gain_null=1.0)
    stored.attrs["not_computed"] = {}
    again = renewed(bare, stored, complete=False)
    assert not {"mixing_gain", "mixing_gain_null"} & set(again)
    assert "one stream" in again.attrs["not_computed"]["mixing_gain"]


def test_a_run_without_metrics_takes_the_new_ones(whole):
    xr.testing.assert_identical(
        renewed(whole["plain"], None, complete=True), whole["plain"].assign_attrs({COMPLETE: True})
    )
