"""Every metric of the catalogue keeps the rules: declared whole, labelled, deterministic, blind to padding."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from depthscope import diagnostics
from depthscope.diagnostics import schema
from depthscope.diagnostics.metrics.catalogue import CATALOGUE

BIBLIOGRAPHY = Path(diagnostics.__file__).with_name("references.bib").read_text()
KEYS = set(re.findall(r"^@\w+\{([\w-]+),", BIBLIOGRAPHY, re.MULTILINE))
PAIRS = "step tokens depth other_depth"
RANK = "step scope tokens centering depth stream"
DIMS = {
    "effective_rank": RANK,
    "entropy_rank": RANK,
    "participation_ratio": RANK,
    "stable_rank": RANK,
    "dong_residual": "step tokens depth stream",
    "token_cosine": RANK,
    "massive_token_fraction": "step depth stream",
    "massive_activation": "step depth stream",
    "num_tokens": "scope tokens depth stream",
    "numerical_rank": RANK,
    "top_energy": RANK,
    "singular_value": "step scope tokens centering depth order",
    "alpha_req": RANK,
    "alpha_req_error": RANK,
    "dirichlet_energy": "step tokens depth stream",
    "curvature": "step tokens depth stream",
    "intrinsic_dimension": "step tokens depth stream",
    "cka": "step estimator tokens depth other_depth",
    "adjacent_cka": "step estimator tokens depth",
    "angular_distance": "step tokens depth other_depth",
    "block_influence": "step tokens depth",
    "stream_cosine": "step depth",
    "stream_cka": "step estimator depth",
    "streamed_effective_rank": "step centering depth stream",
    "streamed_entropy_rank": "step centering depth stream",
    "streamed_participation_ratio": "step centering depth stream",
    "streamed_stable_rank": "step centering depth stream",
    "streamed_top_energy": "step centering depth stream",
    "streamed_alpha_req": "step centering depth stream",
    "streamed_cka": "step depth other_depth",
    "streamed_cka_error": "step depth other_depth",
    "rbf_cka": PAIRS,
    "svcca": PAIRS,
    "pwcca": PAIRS,
    "procrustes": PAIRS,
    "rsa": PAIRS,
    "mutual_knn": PAIRS,
    "cknna": PAIRS,
    "mixing_gain": "step direction connection reduction",
    "composite_gain": "step direction connection reduction",
    "pair_gain": "step direction connection other_connection reduction",
    "composite_attenuation": "step direction connection reduction",
    "deflated_gain": "step connection reduction",
    "mixing_attenuation": "step direction connection reduction",
    "composite_deviation": "step connection reduction",
    "composite_dobrushin": "step connection reduction",
    "suffix_deflated_gain": "step connection reduction",
    "read_streams": "step connection",
    "write_streams": "step connection",
    "mixing_singular_value": "step connection component reduction",
    "composite_singular_value": "step connection component reduction",
    "mixing_eigenvalue_modulus": "step connection component reduction",
    "doubly_stochastic_violation": "step kind connection reduction",
    "identity_distance": "step connection reduction",
    "mixing_entropy": "step connection reduction",
    "depth_kernel": "step connection other_connection",
    "read_share": "step connection stream",
    "write_share": "step connection stream",
    "operator_gain": "step norm connection reduction",
    "composite_operator_gain": "step norm connection reduction",
    "spectral_gap": "step connection reduction",
    "condition_number": "step connection reduction",
    "henrici": "step connection reduction",
    "numerical_radius": "step connection reduction",
    "dobrushin": "step connection reduction",
    "lyapunov_spectrum": "step component reduction",
    "initial_distance": "step connection reduction",
    "replay_distance": "step connection reduction",
    "replayed_deflated_gain": "step connection",
    "effective_streams": "step connection reduction",
    "effective_path_depth": "step connection",
    "read_mass": "step connection",
    "residual_norm": "step depth stream",
    "gradient_norm": "step depth stream",
    "backward_gain": "step depth stream",
    "relative_gradient": "step depth stream",
    "gradient_rank": "step depth stream",
    "gradient_cosine": "step depth stream",
    "channel_squared_mean": "step depth stream",
    "channel_variance": "step depth stream",
    "branch_variance": "step depth stream",
    "branch_share": "step depth stream",
    "adjacent_cosine": "step depth stream",
    "adjacent_cosine_band": "step depth stream quantile",
    "weight_norm": "step weight",
    "weight_gradient_norm": "step weight",
    "weight_gradient_ratio": "step weight",
    "update_ratio": "step weight",
}
OF_CONNECTIONS = ("mixing", "operators", "paths", "replay")
STREAMS_ONLY = {name for name, metric in CATALOGUE.items() if metric.question in OF_CONNECTIONS}
STREAMS_ONLY |= {"stream_cosine", "stream_cka"}
every_metric = pytest.mark.parametrize("name", CATALOGUE)
every_family = pytest.mark.parametrize("family", ["residual", "hc", "mhc"])


# More tokens than features: canonical correlations are refused otherwise.
SIZES = {"layers": 4, "features": 12}


def analyze(run):
    """Every metric, the costly ones too."""
    return diagnostics.analyze(run, metrics=CATALOGUE)


def with_trace(run, trace):
    """The run with another trace."""
    return schema.create_run(trace, statistics=run["statistics"].to_dataset(), attrs=run.attrs)


def run_of(make_run, family):
    """A run of the family; that of mHC knows its initial logits."""
    run = make_run(family, **SIZES)
    if family != "mhc":
        return run
    logits = np.random.default_rng(0).standard_normal((run["trace"].sizes["connection"], 4, 4))
    return diagnostics.with_replay(run, logits, decay=0.5, sinkhorn_steps=20, last="row")


@pytest.fixture(scope="module")
def analyses(make_run):
    return {family: analyze(run_of(make_run, family)) for family in ("residual", "hc", "mhc")}


def test_the_contract_names_every_metric():
    assert set(CATALOGUE) == set(DIMS)


@every_metric
def test_a_declaration_is_whole(name):
    metric = CATALOGUE[name]
    assert metric.name == name == metric.function.__name__
    assert metric.symbol
    assert metric.units
    assert metric.estimator
    assert metric.description.rstrip(".").count("\n") == 0
    assert metric.__doc__.startswith(metric.description)
    assert metric.basis in ("invariant", "stream", "feature")
    assert metric.cite in KEYS
    assert callable(metric.null) or isinstance(metric.null, float) or len(metric.null) > 10
    assert metric.roots
    if metric.healthy is not None:
        assert metric.healthy.source in KEYS | {"heuristic"}
        assert metric.healthy.low is not None or metric.healthy.high is not None


@every_metric
def test_every_metric_is_an_attribute_of_the_package(name):
    assert getattr(diagnostics, name) is CATALOGUE[name]
    assert name in dir(diagnostics)


@every_family
@every_metric
def test_dims_are_those_of_the_contract_or_a_reason_is_given(analyses, name, family):
    analysis = analyses[family]
    if family == "residual" and name in STREAMS_ONLY:
        assert name not in analysis
        assert "one stream" in analysis.attrs["not_computed"][name]
        return
    if family == "hc" and "initial_logits" in CATALOGUE[name].roots:
        assert "initial_logits" in analysis.attrs["not_computed"][name]
        return
    assert list(analysis[name].dims) == DIMS[name].split()
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
    for name in ("effective_rank", "entropy_rank", "participation_ratio", "stable_rank"):
        assert analyses[family][f"{name}_stderr"].dims == analyses[family][name].dims
        assert analyses[family][f"{name}_null"].dims == ("scope", "tokens", "centering")
        assert analyses[family][f"{name}_stderr"].sel(scope="data").isnull().all()
        assert analyses[family][f"{name}_stderr"].sel(scope="sequence").notnull().all()
    assert analyses[family]["cka_null"].dims == ("estimator", "tokens")


@every_family
def test_the_rank_chain_holds(analyses, family):
    chain = ("effective_rank", "entropy_rank", "participation_ratio", "stable_rank")
    for above, below in pairwise(chain):
        assert (analyses[family][above] >= analyses[family][below] - 1e-9).all()


@every_family
def test_a_second_look_gives_the_same(make_run, analyses, family):
    again = analyze(run_of(make_run, family))
    xr.testing.assert_equal(again, analyses[family])


@every_family
def test_the_order_of_sequences_does_not_matter(make_run, family):
    run = make_run(family, layers=2, features=12, samples=3)
    trace = run["trace"].to_dataset()
    turned = with_trace(run, trace.isel(sample=[2, 0, 1]))
    xr.testing.assert_allclose(analyze(turned), analyze(run), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("content", [0.0, 1e6, np.nan])
@every_family
def test_padding_changes_nothing(make_run, family, content):
    run = make_run(family, layers=2, features=12)
    trace = run["trace"].to_dataset()
    padded = trace.pad(
        token=(3, 2), sample=(0, 1), constant_values={v: content for v in trace.data_vars if v != "mask"}
    )
    mask = trace["mask"].pad(token=(3, 2), sample=(0, 1), constant_values=False)
    padded = padded.assign(mask=mask.astype(bool)).assign_coords(token=range(21), sample=range(3))
    padded = padded.astype({v: trace[v].dtype for v in trace.data_vars})
    wider = analyze(with_trace(run, padded))
    xr.testing.assert_allclose(wider, analyze(run), rtol=1e-6, atol=1e-9)


def test_every_reference_is_whole():
    entries = BIBLIOGRAPHY.split("\n@")
    for entry in entries:
        for field in ("author", "title", "year"):
            assert re.search(rf"\b{field}\s*=", entry), entry.splitlines()[0]
    assert len(KEYS) == len(entries)
