"""Metrics of streamed sums: the one-shot ones on the same tokens, NaN with a reason where the sums do not decide."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from depthscope import diagnostics
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.quantities.token_spectra import RANKS, noise_ranks

NAMES = [name for name, metric in CATALOGUE.items() if metric.question == "streamed"]


@pytest.mark.parametrize("family", ["residual", "mhc"])
def test_they_equal_the_metrics_of_a_trace_that_holds_every_token(make_run, family):
    found = diagnostics.analyze(make_run(family, layers=3))
    for name in RANKS:
        exact = found[name].sel(scope="data", tokens="all", drop=True)
        np.testing.assert_allclose(found[f"streamed_{name}"].transpose(*exact.dims), exact, rtol=1e-6)
    exact = found.cka.sel(estimator="unbiased", tokens="all")
    np.testing.assert_allclose(found.streamed_cka.values, exact.values, atol=1e-6)


def test_they_are_blind_to_the_sampled_states(make_run):
    run = make_run("residual", layers=2)
    before = diagnostics.analyze(run, metrics=NAMES)
    trace = run["trace"].to_dataset()
    other = trace.assign(residual=trace.residual * 0 + 7)
    changed = diagnostics.create_run(other, statistics=run["statistics"].to_dataset(), attrs=run.attrs)
    xr.testing.assert_equal(diagnostics.analyze(changed, metrics=NAMES), before)


def test_nulls_are_those_of_the_number_of_tokens_that_were_streamed(make_run):
    run = make_run("residual", layers=2)
    statistics = run["statistics"].to_dataset()
    statistics["streamed_count"] = statistics.streamed_count * 0 + 1000.0
    many = diagnostics.create_run(run["trace"].to_dataset(), statistics=statistics, attrs=run.attrs)
    found = diagnostics.analyze(many, metrics=NAMES)
    for name in RANKS:
        expected = noise_ranks(1000.0, 32)[name]
        np.testing.assert_allclose(found[f"streamed_{name}_null"], expected, err_msg=name)


def spectra(small: float) -> dict[str, xr.DataArray]:
    """Two depths; at the second rounding would move half of the eigenvalues from 0 to some size."""
    values = np.ones((2, 2, 8))
    values[:, 1, 4:] = 0.0
    shaken = values.copy()
    shaken[1, 1, 4:] = small
    dims = ("centering", "depth", "component")
    coords = {"centering": ["raw", "centred"], "depth": [4, 9]}
    found = {
        "eigenvalue": xr.DataArray(values, coords, dims),
        "eigenvalue_shaken": xr.DataArray(shaken, coords, dims),
    }
    return found | {f"stream_{name}": value.expand_dims(stream=[0]) for name, value in found.items()}


def of(name: str, small: float, centering: tuple[str, ...] = ("raw", "centred")) -> xr.DataArray:
    source = diagnostics.quantities.registry.Quantities(xr.Dataset(spectra(small)), choices={})
    source._values["centering"] = centering
    return source.call(CATALOGUE[name].function)


def test_a_rank_that_rounding_decides_is_undefined_and_says_why():
    found = of("streamed_effective_rank", 1e-8)  # four σ of 1e-4 beside four of 1: exp H moves by 1e-3
    np.testing.assert_allclose(found.sel(centering="raw", stream="mean"), [8, 4])
    np.testing.assert_allclose(found.sel(centering="centred", stream="mean"), [8, np.nan])
    assert "centred at depth 9" in found.attrs["undefined_because"]
    energies = of("streamed_participation_ratio", 1e-8)  # λ of 1e-8 are nothing beside 1
    np.testing.assert_allclose(energies.sel(centering="centred", stream="mean"), [8, 4])
    assert "undefined_because" not in energies.attrs


def test_one_kind_of_centring_may_be_asked_for():
    assert of("streamed_participation_ratio", 0.0, ("centred",)).centering.values.tolist() == ["centred"]


def test_the_error_is_the_jackknife_by_hand(make_run):
    run = make_run("residual", layers=1)
    statistics = run["statistics"].to_dataset().drop_vars("hsic_without")
    tables = np.array([[[1.0, c], [c, 1.0]] for c in (0.1, 0.2, 0.6)])
    statistics["hsic_without"] = ("group", "depth", "other_depth"), tables
    run = diagnostics.create_run(run["trace"].to_dataset(), statistics=statistics, attrs=run.attrs)
    error = diagnostics.analyze(run, metrics=["streamed_cka_error"]).streamed_cka_error.values[0]
    # mean 0.3, squares 0.04 + 0.01 + 0.09 = 0.14, times 2/3
    np.testing.assert_allclose(error, [[0, (0.28 / 3) ** 0.5], [(0.28 / 3) ** 0.5, 0]], atol=1e-12)


def test_cka_of_a_depth_without_variance_is_undefined(make_run):
    run = make_run("residual", layers=1)
    statistics = run["statistics"].to_dataset()
    statistics["hsic"] = statistics.hsic.copy(data=[[0.0, 0.0], [0.0, 2.0]])
    run = diagnostics.create_run(run["trace"].to_dataset(), statistics=statistics, attrs=run.attrs)
    found = diagnostics.analyze(run, metrics=["streamed_cka"]).streamed_cka.values[0]
    np.testing.assert_allclose(found, [[np.nan, np.nan], [np.nan, 1.0]])


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_did_not_stream_says_how_to(make_run, name):
    run = make_run("residual", layers=1)
    bare = diagnostics.create_run(run["trace"].to_dataset(), attrs=run.attrs)
    found = diagnostics.analyze(bare, metrics=[name])
    assert "streaming=True" in found.attrs["not_computed"][name]


def test_a_part_of_the_sequences_is_named(make_run):
    run = make_run("residual", layers=2)
    assert not any("sequences" in value.attrs for value in diagnostics.analyze(run, metrics=NAMES).values())
    statistics = run["statistics"].to_dataset()
    for name in ("eigenvalue", "hsic", "hsic_without"):
        statistics[name].attrs["every"] = 4
    part = diagnostics.create_run(run["trace"].to_dataset(), statistics=statistics, attrs=run.attrs)
    found = diagnostics.analyze(part, metrics=NAMES)
    for name in ("streamed_effective_rank", "streamed_cka"):
        assert found[name].attrs["sequences"] == "one in 4; streamed_count is of their tokens"
