"""Every metric of the catalogue follows the rules: declared completely, labelled, deterministic, blind to padding."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from depthscope import CATALOGUE, diagnostics
from depthscope.app.text.bibliography import bibliography, entries, reference
from depthscope.diagnostics import schema

KEYS = set(entries(bibliography()))
OF_SEVERAL_STREAMS = {
    name
    for name, metric in CATALOGUE.items()
    if {"h_res", "h_pre", "h_post"} & set(metric.roots) or "stream_states" in metric.needs
}
every_family = pytest.mark.parametrize("family", ["residual", "mhc"])


# More tokens than features: canonical correlations are refused otherwise.
SIZES = {"layers": 4, "features": 12}


def analyze(run):
    """Every metric, the costly ones too."""
    return diagnostics.analyze(run, metrics=CATALOGUE)


def with_trace(run, trace):
    """The run with another trace."""
    return schema.create_run(trace, statistics=run["statistics"].to_dataset(), attrs=run.attrs)


def run_of(make_run, family):
    return make_run(family, **SIZES)


@pytest.fixture(scope="module")
def analyses(make_run):
    return {family: analyze(run_of(make_run, family)) for family in ("residual", "mhc")}


def test_a_declaration_is_whole():
    for name in CATALOGUE:
        metric = CATALOGUE[name]
        assert metric.name == name == metric.function.__name__
        assert metric.symbol
        assert metric.units
        assert metric.estimator
        assert metric.description.rstrip(".").count("\n") == 0
        assert metric.__doc__.startswith(metric.description)
        assert metric.basis in ("invariant", "stream", "feature")
        assert metric.cite.removeprefix("this project, after ") in KEYS | {"this project"}
        # Text in place of a null is the reason why there is none: more than the word.
        assert callable(metric.null) or isinstance(metric.null, float) or len(metric.null) > 10
        assert metric.roots
        assert metric.label
        assert metric.title
        assert metric.null_error >= 0.0
        assert metric.question_text.endswith(("?", ".", "!"))
        if metric.healthy is not None:
            assert metric.healthy.source in KEYS | {"this project"}
            assert metric.healthy.low is not None or metric.healthy.high is not None


@every_family
def test_dims_are_those_of_the_declaration_or_a_reason_is_given(analyses, family):
    for name in CATALOGUE:
        analysis = analyses[family]
        absent = analysis.attrs["not_computed"].get(name, "")
        if family == "residual" and (name in OF_SEVERAL_STREAMS or "one stream" in absent):
            assert name not in analysis
            assert "one stream" in absent
            continue
        step = ("step",) if CATALOGUE[name].per_step else ()
        assert analysis[name].dims == (*step, *CATALOGUE[name].dims)
        for key in ("long_name", "units", "symbol", "references", "estimator", "basis"):
            assert analysis[name].attrs[key]


@every_family
def test_labels_are_those_of_the_contract(analyses, family):
    analysis = analyses[family]
    streams = ["mean"] if family == "residual" else ["mean", "0", "1", "2", "3"]
    assert analysis["stream"].values.tolist() == streams
    assert analysis["scope"].values.tolist() == ["sequence", "data"]
    assert analysis["tokens"].values.tolist() == ["all", "ordinary"]
    assert analysis["centering"].values.tolist() == ["raw", "centred"]
    assert analysis["estimator"].values.tolist() == ["biased", "unbiased"]
    assert {"layer", "site", "module"} <= set(analysis.coords)
    assert analysis.attrs["family"] == family
    if family != "residual":
        assert analysis["reduction"].values.tolist() == ["mean", "median", "p1", "p99", "max"]
        assert analysis["direction"].values.tolist() == ["forward", "backward"]
        assert analysis["kind"].values.tolist() == ["row", "column", "negativity"]
        assert {"connection_layer", "branch"} <= set(analysis.coords)


@every_family
def test_ranks_carry_null_and_standard_error(analyses, family):
    for name in ("effective_rank", "participation_ratio"):
        assert analyses[family][f"{name}_stderr"].dims == analyses[family][name].dims
        assert analyses[family][f"{name}_null"].dims == ("scope", "tokens", "centering")
        assert analyses[family][f"{name}_stderr"].sel(scope="data").isnull().all()
        assert analyses[family][f"{name}_stderr"].sel(scope="sequence").notnull().all()
    assert analyses[family]["cka_null"].dims == ("estimator", "tokens")


@every_family
def test_a_second_look_gives_the_same(make_run, analyses, family):
    again = analyze(run_of(make_run, family))
    xr.testing.assert_equal(again, analyses[family])


@every_family
def test_the_order_of_sequences_does_not_matter(make_run, family):
    run = make_run(family, layers=2, features=12, samples=3)
    trace = run["trace"].to_dataset()
    # Not exactly equal: sums over sequences are rounded in another order.
    turned = with_trace(run, trace.isel(sample=[2, 0, 1]))
    xr.testing.assert_allclose(analyze(turned), analyze(run), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("family", "content"), [("residual", 1e6), ("mhc", 1e6), ("mhc", np.nan)])
def test_padding_changes_nothing(make_run, family, content):
    run = make_run(family, layers=2, features=12)
    trace = run["trace"].to_dataset()
    padded = trace.pad(
        token=(3, 2), sample=(0, 1), constant_values={v: content for v in trace.data_vars if v != "mask"}
    )
    mask = trace["mask"].pad(token=(3, 2), sample=(0, 1), constant_values=False)
    # xarray's padding turns booleans and integers into objects or floats.
    padded = padded.assign(mask=mask.astype(bool)).assign_coords(token=range(21), sample=range(3))
    padded = padded.astype({v: trace[v].dtype for v in trace.data_vars})
    wider = analyze(with_trace(run, padded))
    xr.testing.assert_allclose(wider, analyze(run), rtol=1e-6, atol=1e-9)


def test_every_reference_is_whole():
    for key in KEYS:
        found = reference(key)
        for field in (found.surnames, found.title, found.year):
            assert field, key
    # Counted by another way than the reader's: one entry more than follow a line break.
    assert len(KEYS) == bibliography().count("\n@") + 1
