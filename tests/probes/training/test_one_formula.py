"""Does a metric that is added as CONTRIBUTING says have one number by analysis, live row and exact sums?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from depthscope import diagnostics, probes
from depthscope.diagnostics import schema
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.metrics.declaration import metric
from depthscope.diagnostics.quantities.exact_sums import EXACT


@metric(
    symbol="f",
    dims="scope tokens centering depth stream",
    cite="this project",
    basis="stream",
    null="none: only a test knows this metric",
    estimator="plug-in",
)
def energy_of_the_first(singular_values: xr.Variable) -> xr.Variable:
    """Share of the energy in the strongest direction of a spectrum."""
    energy = singular_values**2
    return energy.isel(component=0) / energy.sum("component")


@metric(
    symbol="g",
    dims="depth stream",
    cite="this project",
    basis="stream",
    null="none: only a test knows this metric",
    estimator="over all real tokens",
)
def logarithm_of_the_size(mean_square_norm: xr.Variable) -> xr.Variable:
    """Logarithm of the size of a token."""
    return np.log(mean_square_norm) / 2


@pytest.fixture
def recorded(monkeypatch, models, ids):
    """A recording whose sampled and stored tokens are all of one forward."""
    declared = (energy_of_the_first, logarithm_of_the_size)
    for each in declared:
        monkeypatch.setitem(CATALOGUE, each.name, each)
    torch.manual_seed(0)
    names = [each.name for each in declared]
    model = models["lucidrains"]("mhc")
    options = {"live_tokens": ids.numel(), "max_sequences": len(ids)}
    with probes.record(model, metrics=names, **options) as recorder:
        model(ids)
        recorder.step()
    return recorder.run


def test_a_metric_of_spectra_has_one_number_in_a_trace_and_a_row(recorded, ids):
    analysis = diagnostics.analyze(recorded, ["energy_of_the_first"]).isel(step=0)
    expected = analysis["energy_of_the_first"].sel(scope="data")
    row = schema.chain_dataset(recorded, "metrics")["energy_of_the_first"].isel(step=0)
    assert row.dims == ("scope", "tokens", "centering", "depth", "stream")
    assert row["stream"].values.tolist() == expected["stream"].values.tolist() == ["mean", *"0123"]
    assert f"on {ids.numel()} sampled tokens" in row.attrs["estimator"]
    np.testing.assert_allclose(row.sel(scope="data"), expected, rtol=1e-9)


def test_a_metric_of_sums_has_one_number_in_a_trace_a_row_and_the_curves(recorded):
    name = "logarithm_of_the_size"
    expected = diagnostics.analyze(recorded, [name])[name].isel(step=0)
    row = schema.chain_dataset(recorded, "metrics")[name].isel(step=0)
    curve = diagnostics.training_curves(recorded)[name].isel(step=0)
    assert row.attrs["estimator"] == curve.attrs["estimator"] == EXACT
    np.testing.assert_allclose(row, expected, rtol=1e-6)
    several = {"stream": list("0123")}  # the size of their mean is no sum over streams
    np.testing.assert_allclose(curve.sel(several), expected.sel(several), rtol=1e-6)
