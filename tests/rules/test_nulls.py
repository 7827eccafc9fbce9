"""Every rank and similarity stands beside its null: what independent noise of the same size really gives."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from depthscope import diagnostics
from depthscope.diagnostics import schema
from depthscope.diagnostics.metrics.catalogue import CATALOGUE

# How far the mean over many draws may lie from the null beside four standard errors, relatively: the laws of large
# matrices have corrections at 6 sequences of 60 tokens and 24 features, at the edge of the spectrum above all.
TOLERANCES = {
    "effective_rank": 0.02,
    "entropy_rank": 0.03,
    "participation_ratio": 0.03,
    "stable_rank": 0.1,
    "numerical_rank": 0.02,
    "top_energy": 0.03,
    "alpha_req": 0.15,
    "gradient_rank": 0.05,
    "token_cosine": 0.03,
    "dirichlet_energy": 0.0,
    "curvature": 0.01,
    "intrinsic_dimension": 0.05,
    "cka": 0.02,
    "adjacent_cka": 0.02,
    "stream_cka": 0.02,
    "angular_distance": 0.0,
    "block_influence": 0.0,
    "adjacent_cosine": 0.0,
    "stream_cosine": 0.0,
    "gradient_cosine": 0.0,
    "rbf_cka": 0.0,
    "svcca": 0.05,
    "pwcca": 0.05,
    "procrustes": 0.02,
    "rsa": 0.0,
    "mutual_knn": 0.05,
    "cknna": 0.15,
}
COMPARED = ("collapse", "shape", "similarity", "alignment")
WITHOUT = {"dong_residual", "massive_token_fraction", "massive_activation", "num_tokens", "alpha_req_error"}


@pytest.fixture(scope="module")
def analysis(make_run):
    sizes = {"layers": 4, "samples": 6, "tokens": 60, "features": 24, "weights": False}
    run = make_run("hc", **sizes, streams=2)
    trace = run["trace"].to_dataset().load()
    rng = np.random.default_rng(5)
    for name in ("residual", "gradient"):
        trace[name].values[:] = rng.standard_normal(trace[name].shape)
    trace["mask"].values[:] = True
    return diagnostics.analyze(schema.create_run(trace, attrs=run.attrs), metrics=TOLERANCES).isel(step=0)


def test_every_rank_and_similarity_has_its_tolerance_here():
    assert {n for n, metric in CATALOGUE.items() if metric.question in COMPARED} <= set(TOLERANCES) | WITHOUT


@pytest.mark.parametrize("name", TOLERANCES)
def test_noise_lies_at_its_null(analysis, name):
    value = analysis[name].isel(stream=0) if "stream" in analysis[name].dims else analysis[name]
    null = analysis.get(f"{name}_null", xr.DataArray(CATALOGUE[name].null))
    value, null = (each.sel(tokens="all") if "tokens" in each.dims else each for each in (value, null))
    draws = [dim for dim in ("depth", "other_depth") if dim in value.dims]
    if "other_depth" in draws:  # a depth beside itself is no comparison
        value = value.where(value["depth"] != value["other_depth"])
    apart = abs(value.mean(draws) - null)
    chance = 4 * value.std(draws, ddof=1) / value.sizes["depth"] ** 0.5
    assert apart.notnull().all()
    assert (apart <= TOLERANCES[name] * abs(null) + chance).all(), (apart.values, chance.values, null.values)


def test_where_a_measure_is_refused_its_null_is_undefined(make_run):
    run = make_run("residual", layers=1, features=64)  # 28 tokens
    found = diagnostics.analyze(run, metrics=["procrustes", "cknna", "intrinsic_dimension"])
    assert 0 < float(found["procrustes_null"].sel(tokens="all")) < np.pi / 2
    short = run["trace"].to_dataset().isel(token=slice(0, 5), sample=[0])  # fewer tokens than neighbours
    assert "cknna" in diagnostics.analyze(schema.create_run(short, attrs=run.attrs)).attrs["on_request"]
    source = diagnostics.quantities.registry.Quantities(short)
    null = source.call(CATALOGUE["cknna"].null)
    assert null.isnull().all()
