"""A run that breaks the contract is refused, and the error names the variable, group or site."""

from __future__ import annotations

import pytest
import xarray as xr

from depthscope.diagnostics import schema
from tests.models.linear_runs import MODELS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda trace: trace.rename(mask="masked"), r"/trace has no variable 'mask'"),
        (
            lambda trace: trace.assign(h_res=trace.h_res.transpose(..., "stream_in", "stream_out")),
            r"h_res has dims .* expected",
        ),
        (lambda trace: trace.assign(residual=trace.residual.astype(int)), "residual has dtype int64"),
        (lambda trace: trace.assign_coords(site=trace["site"].copy(data=["somewhere"] * 13)), "somewhere"),
        (lambda trace: trace.isel(stream_in=slice(2)), "stream_in"),
    ],
)
def test_a_wrong_variable_is_named(make_run, change, message):
    run = make_run("mhc").copy()
    run["trace"] = change(run["trace"].to_dataset())
    with pytest.raises(schema.SchemaError, match=message):
        schema.validate(run)


def test_an_unknown_group_is_refused(make_run):
    run = make_run("mhc").copy()
    run["plots"] = xr.Dataset()
    with pytest.raises(schema.SchemaError, match="unknown group /plots"):
        schema.validate(run)


def _linear(name: str, **changes: object) -> xr.DataTree:
    """A run of a small linear model, its trace with other variables or coordinates."""
    run = MODELS[name].run()
    return schema.create_run(run["trace"].to_dataset().assign(changes), attrs=run.attrs)


@pytest.mark.parametrize("name", MODELS)
def test_runs_of_every_kind_of_connection_are_saved_and_opened(name, tmp_path):
    run = MODELS[name].run(constraint="doubly stochastic within 1e-07")
    opened = schema.open_run(schema.save_run(run, tmp_path / "run.zarr.zip"))
    assert opened.attrs["proof"] == "proven"
    xr.testing.assert_identical(opened["trace"].to_dataset().load(), run["trace"].to_dataset())


def test_parts_that_contradict_the_connections_are_refused():
    plain = MODELS["scaled"].run()["trace"]
    with pytest.raises(
        schema.SchemaError, match="residual_scale and 3 streams; factors are of plain connections"
    ):
        _linear("streams", residual_scale=plain["residual_scale"])
    short = MODELS["attention over depth"].run()["trace"].to_dataset().isel(source=slice(0, 5))
    with pytest.raises(
        schema.SchemaError, match="5 sources and 5 connections; expected at least one source more"
    ):
        schema.create_run(short, attrs={"proof": "proven"})
    with pytest.raises(schema.SchemaError, match=r"after_sum has 'softmax'; expected some of"):
        _linear("plain", after_sum=("connection", ["softmax"] * 5))
    with pytest.raises(
        schema.SchemaError, match=r"/trace/proof has 'maybe'; expected some of \('proven', 'unproven: '\)"
    ):
        _linear("plain", proof=("connection", ["maybe"] * 5))


@pytest.mark.parametrize("proof", ["yes", "unproven: ", "unproven", "", 1.0])
def test_a_proof_is_proven_or_unproven_with_its_reason(proof):
    with pytest.raises(schema.SchemaError, match="expected 'proven', or 'unproven: ' and the reason"):
        MODELS["plain"].run(proof=proof)


def test_a_constraint_is_in_words():
    with pytest.raises(schema.SchemaError, match="expected a description of what the matrices satisfy"):
        MODELS["streams"].run(constraint="")
