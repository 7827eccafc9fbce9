"""The shape of the cloud of tokens against numpy, sequence by sequence."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from depthscope import diagnostics

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
