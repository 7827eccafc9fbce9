"""Is the null of every rank and similarity what independent noise of the same size really gives?"""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from depthscope import CATALOGUE, diagnostics
from depthscope.diagnostics import schema

# A null of the states or their gradients is what independent noise gives; one of connections is another network.
OF_NOISE = [
    name
    for name, metric in CATALOGUE.items()
    if not isinstance(metric.null, str) and set(metric.roots) <= {"residual", "gradient"}
]


@pytest.fixture(scope="module")
def analysis(make_run):
    sizes = {"layers": 4, "samples": 6, "tokens": 60, "features": 24, "weights": False}
    run = make_run("hc", **sizes, streams=2)
    trace = run["trace"].to_dataset().load()
    rng = np.random.default_rng(5)
    for name in ("residual", "gradient"):
        trace[name].values[:] = rng.standard_normal(trace[name].shape)
    trace["mask"].values[:] = True
    return diagnostics.analyze(schema.create_run(trace, attrs=run.attrs), metrics=OF_NOISE).isel(step=0)


@pytest.mark.parametrize("name", OF_NOISE)
def test_noise_lies_at_its_null(analysis, name):
    value = analysis[name].isel(stream=0) if "stream" in analysis[name].dims else analysis[name]
    null = analysis.get(f"{name}_null", xr.DataArray(CATALOGUE[name].null))
    value, null = (each.sel(tokens="all") if "tokens" in each.dims else each for each in (value, null))
    draws = [dim for dim in ("depth", "other_depth") if dim in value.dims]
    if "other_depth" in draws:  # a depth with itself is no comparison
        value = value.where(value["depth"] != value["other_depth"])
    difference = abs(value.mean(draws) - null)
    # Four standard errors. Pairs of depths share depths: only as many draws count as there are depths.
    chance = 4 * value.std(draws, ddof=1) / value.sizes["depth"] ** 0.5
    assert difference.notnull().all()
    assert (difference <= CATALOGUE[name].null_error * abs(null) + chance).all(), (
        difference.values,
        chance.values,
        null.values,
    )
