"""The shape of the cloud of tokens against numpy, sequence by sequence."""

from __future__ import annotations

import numpy as np
import pytest
import skdim
import xarray as xr
from depthscope.diagnostics.quantities.neighbour_dimensions import neighbour_dimension
from scipy.stats import kurtosis

from depthscope import diagnostics
from depthscope.diagnostics import schema

NAMES = ["numerical_rank", "top_energy", "alpha_req", "alpha_req_error", "dirichlet_energy", "curvature"]
PLAIN = {"tokens": "all", "stream": "mean", "step": 0}


@pytest.fixture(scope="module")
def analysis(mhc_run):
    return diagnostics.analyze(mhc_run, metrics=[*NAMES, "intrinsic_dimension"])


@pytest.fixture(scope="module")
def sequences(mhc_run):
    """Tokens of each sequence at depth 5, mean over streams."""
    states, mask = mhc_run.trace.residual.values[5].astype(float).mean(2), mhc_run.trace.mask.values
    return [x[keep] for x, keep in zip(states, mask, strict=True)]


def energies(x, centering):
    return np.linalg.svd(x - x.mean(0) * (centering == "centred"), compute_uv=False) ** 2


@pytest.mark.parametrize("centering", ["raw", "centred"])
def test_numbers_of_the_spectrum(analysis, sequences, centering):
    found = analysis.sel(PLAIN, drop=True).sel(depth=5, centering=centering)
    pooled = energies(np.concatenate(sequences), centering)
    each = [energies(x, centering) for x in sequences]
    share = [e[:10].sum() / e.sum() for e in each]
    assert float(found["top_energy"].sel(scope="sequence")) == pytest.approx(np.mean(share), rel=1e-6)
    assert float(found["top_energy"].sel(scope="data")) == pytest.approx(pooled[:10].sum() / pooled.sum())
    ranks = [len(x) - (centering == "centred") for x in sequences]
    assert float(found["numerical_rank"].sel(scope="sequence")) == np.mean(ranks)
    index = np.arange(4, len(sequences[0]) + len(sequences[1]) + (centering == "raw"))
    # numpy multiplies residuals by w: the authors' weights are those of their squares, 1/rank.
    slope, cov = np.polyfit(np.log(index), np.log(pooled[3 : 3 + len(index)]), 1, w=index**-0.5, cov=True)
    assert float(found["alpha_req"].sel(scope="data")) == pytest.approx(-slope[0], rel=1e-5)
    assert float(found["alpha_req_error"].sel(scope="data")) == pytest.approx(cov[0, 0] ** 0.5, rel=1e-5)


def test_rounding_of_float32_counts_for_no_rank():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 3)) @ rng.standard_normal((3, 20))).astype(np.float32)
    assert float(diagnostics.numerical_rank(xr.DataArray(x, dims=("token", "feature")))) == 3.0


def test_energy_and_curvature_of_a_sequence(analysis, sequences):
    found = analysis.sel(PLAIN, drop=True).sel(depth=5)
    shares, angles = [], []
    for x in sequences:
        shares.append(((x - x.mean(0)) ** 2).sum() / (x**2).sum())
        v = np.diff(x, axis=0)
        cosine = (v[1:] * v[:-1]).sum(1) / np.linalg.norm(v[1:], axis=1) / np.linalg.norm(v[:-1], axis=1)
        angles.append(np.arccos(cosine).mean())
    assert float(found["dirichlet_energy"]) == pytest.approx(np.mean(shares), rel=1e-6)
    assert float(found["curvature"]) == pytest.approx(np.mean(angles), rel=1e-6)


def test_noise_gives_the_nulls(make_run):
    run = make_run("residual", layers=1, samples=4, tokens=128, features=64)
    trace = run["trace"].to_dataset().load()
    trace["residual"].values[:] = np.random.default_rng(1).standard_normal(trace["residual"].shape)
    trace["mask"].values[:] = True
    run = diagnostics.create_run(trace, attrs=run.attrs)
    found = diagnostics.analyze(run, metrics=NAMES).isel(step=0, depth=0, stream=0).sel(tokens="all")
    raw = found.sel(centering="raw")
    for name, near in (("top_energy", 0.03), ("numerical_rank", 0.0), ("alpha_req", 0.1)):
        for scope in ("sequence", "data"):
            expected = float(raw[f"{name}_null"].sel(scope=scope))
            assert float(raw[name].sel(scope=scope)) == pytest.approx(expected, rel=near), (name, scope)
    assert float(found["dirichlet_energy"]) == pytest.approx(float(found["dirichlet_energy_null"]), abs=2e-3)
    assert float(found["curvature"]) == pytest.approx(found["curvature"].attrs["null"], abs=0.02)


def test_a_plane_has_two_dimensions(make_run):
    run = make_run("residual", layers=1, samples=4, tokens=200, features=16)
    trace = run["trace"].to_dataset().load()
    rng = np.random.default_rng(2)
    flat = rng.random((*trace["residual"].shape[:-1], 2)) @ rng.standard_normal((2, 16))
    trace["residual"].values[:] = flat
    trace["residual"].values[:, 0, 10] = trace["residual"].values[:, 0, 9]  # a repeated token counts once
    found = diagnostics.analyze(
        diagnostics.create_run(trace, attrs=run.attrs), metrics=["intrinsic_dimension"]
    )
    np.testing.assert_allclose(found["intrinsic_dimension"].sel(tokens="all"), 2.0, atol=0.25)


# --- the error and the bias of the intrinsic dimension


def cloud_run(points):
    """A plain run of one depth more than it needs from tokens (sample, token, feature)."""
    states = np.stack([points, points])[:, :, :, None].astype(np.float64)
    names = {
        name: ("depth", np.array(words, dtype=object))
        for name, words in {"site": ["embed", "post"], "module": ["embed", "block"]}.items()
    }
    coords = {"depth": [0, 1], "layer": ("depth", [-1, 0]), "stream": [0], **names}
    variables = {
        "residual": (schema.STATE, states),
        "mask": (("sample", "token"), np.ones(states.shape[1:3], bool)),
    }
    trace = xr.Dataset(variables, coords)
    return diagnostics.create_run(trace, attrs={"family": "residual", "n_streams": 1})


def dimension_of(points, **options):
    found = diagnostics.analyze(
        cloud_run(points), metrics=["intrinsic_dimension", "intrinsic_dimension_bias"], **options
    )
    return found.isel(step=0, depth=0).sel(tokens="all", stream="mean")


def test_the_error_is_that_of_leaving_out_each_sequence_and_computing_anew():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((5, 40, 6)) @ rng.standard_normal((6, 12)) + rng.standard_normal((5, 1, 12))
    points[1, :4] = points[0, :4]  # tokens of several sequences stay when one of them is left out
    points[2, 5] = points[2, 6]  # one repeated in its own
    found = dimension_of(points)

    def direct(kept):
        return skdim.id.TwoNN().fit(np.unique(np.concatenate(kept), axis=0)).dimension_

    assert float(found["intrinsic_dimension"]) == pytest.approx(direct(list(points)), rel=1e-6)
    without = np.array([direct([points[i] for i in range(5) if i != left_out]) for left_out in range(5)])
    error = np.sqrt(0.8 * ((without - without.mean()) ** 2).sum())
    assert float(found["intrinsic_dimension_stderr"]) == pytest.approx(error, rel=1e-6)
    assert found["intrinsic_dimension_stderr"].attrs["degrees_of_freedom"] == 4
    again = dimension_of(points, jackknife=True)  # already known: nothing is measured twice
    assert float(again["intrinsic_dimension_stderr"]) == float(found["intrinsic_dimension_stderr"])


def test_one_sequence_has_no_error():
    found = dimension_of(np.random.default_rng(0).standard_normal((1, 50, 4)))
    assert np.isnan(found["intrinsic_dimension_stderr"])
    assert "one sequence" in found["intrinsic_dimension_stderr"].attrs["undefined_because"]
    assert float(found["intrinsic_dimension"]) > 2


def test_the_interval_covers_the_value_of_many_draws():
    rng = np.random.default_rng(2)
    draws = []
    for _ in range(60):
        # Sequences that differ in their place, as real ones do.
        points = rng.standard_normal((8, 25, 5)) + 2.0 * rng.standard_normal((8, 1, 5))
        neighbours = neighbour_dimension(points.reshape(-1, 5), np.repeat(np.arange(8), 25))
        away = neighbours.without - neighbours.without.mean()
        draws.append((neighbours.dimension, np.sqrt(7 / 8 * (away @ away))))
    values, errors = np.array(draws).T
    covered = np.mean(np.abs(values - values.mean()) <= 2.365 * errors)  # t with seven degrees
    assert 0.85 < covered <= 1.0
    assert errors.mean() == pytest.approx(values.std(), rel=0.4)


@pytest.mark.parametrize("dimension", [3, 20, 60])
def test_measured_and_bias_give_the_dimension_of_a_normal_cloud(dimension):
    points = np.random.default_rng(dimension).standard_normal((4, 100, dimension))
    # Into a wider space without a change of shape: the cloud stays round.
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((80, dimension)))[0].T
    found = dimension_of(points @ turn)
    measured, bias = float(found["intrinsic_dimension"]), float(found["intrinsic_dimension_bias"])
    if dimension > 3:
        assert measured < 0.9 * dimension  # what the bias is about
    assert measured - bias == pytest.approx(dimension, rel=0.2)


def test_the_bias_is_undefined_where_no_cloud_measures_as_much():
    few = np.random.default_rng(0).standard_normal((1, 8, 4))
    assert np.isnan(dimension_of(few)["intrinsic_dimension_bias"])


def test_kurtosis_and_zeros_are_those_of_scipy_and_of_a_count(make_run):
    run = make_run("mhc", layers=2)
    trace = run["trace"].to_dataset().load()
    states = trace["residual"].copy(deep=True)
    states.values[1, 0, 2, 1, :5] = 0.0
    found = diagnostics.analyze(
        schema.create_run(trace.assign(residual=states), attrs=run.attrs),
        metrics=["feature_kurtosis", "zero_fraction"],
    )
    real = trace["mask"].values
    for depth, tokens in enumerate(states.values[:, real].astype(float)):
        for stream in range(tokens.shape[1]):
            here = {"step": 0, "depth": depth, "stream": stream + (found.sizes["stream"] > tokens.shape[1])}
            expected = kurtosis(tokens[:, stream], axis=-1, fisher=False).mean()
            np.testing.assert_allclose(found["feature_kurtosis"].isel(here), expected, rtol=1e-9)
            assert found["zero_fraction"].isel(here).item() == pytest.approx((tokens[:, stream] == 0).mean())
    assert float(found["zero_fraction"].isel(depth=1).max()) == pytest.approx(
        5 / (real.sum() * states.shape[-1])
    )
