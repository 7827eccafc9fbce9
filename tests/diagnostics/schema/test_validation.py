"""A run that breaks the contract is refused, and the error names the variable, group or site."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from depthscope.diagnostics import schema


def _renamed(run: xr.DataTree, **names: str) -> xr.DataTree:
    tree = run.copy()
    tree["trace"] = tree["trace"].to_dataset().rename(names)
    return tree


def test_a_wrong_variable_is_named(make_run):
    run = make_run("mhc")
    with pytest.raises(schema.SchemaError, match=r"/trace has no variable 'mask'"):
        schema.validate(_renamed(run, mask="masked"))
    turned = run.copy()
    trace = run["trace"].to_dataset()
    turned["trace"] = trace.assign(h_res=trace.h_res.transpose(..., "stream_in", "stream_out"))
    with pytest.raises(schema.SchemaError, match=r"h_res has dims .* expected"):
        schema.validate(turned)
    integers = run.copy()
    integers["trace"] = trace.assign(residual=trace.residual.astype(int))
    with pytest.raises(schema.SchemaError, match="residual has dtype int64"):
        schema.validate(integers)


def test_wrong_sites_streams_and_groups_are_refused(make_run):
    run = make_run("mhc")
    trace = run["trace"].to_dataset()
    odd = run.copy()
    odd["trace"] = trace.assign_coords(
        site=("depth", np.array(["somewhere"] * trace.sizes["depth"], dtype=object))
    )
    with pytest.raises(schema.SchemaError, match="somewhere"):
        schema.validate(odd)
    narrow = run.copy()
    narrow["trace"] = trace.isel(stream_in=slice(2))
    with pytest.raises(schema.SchemaError, match="stream_in"):
        schema.validate(narrow)
    extra = run.copy()
    extra["plots"] = xr.Dataset()
    with pytest.raises(schema.SchemaError, match="unknown group /plots"):
        schema.validate(extra)
