"""The kept singular values are those of the states, with noise of the same energy beside them."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.diagnostics.analysis.jackknife import jackknife
from depthscope.diagnostics.metrics.collapse import effective_rank
from depthscope.diagnostics.metrics.spectrum import singular_value, stored_orders
from depthscope.diagnostics.quantities.registry import Quantities


def spectra(states: np.ndarray, mask: np.ndarray) -> dict[str, xr.DataArray]:
    """The metric and what stands beside it for states (depth, sample, token, stream, feature)."""
    trace = xr.Dataset({"residual": (schema.STATE, states), "mask": (("sample", "token"), mask)})
    source = Quantities(trace)
    return {name: source.labelled(value) for name, value in singular_value.evaluate(source).items()}


@pytest.fixture(scope="module")
def states() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 3, 20, 2, 40)) + rng.standard_normal(40)


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    mask = np.ones((3, 20), bool)
    mask[1, :8] = False
    return mask


def test_every_kept_value_is_that_of_the_states(states, mask):
    found = spectra(states, mask)["singular_value"].sel(tokens="all")
    mean = states.mean(3)
    for depth in (0, 1):
        pooled = mean[depth][mask]
        expected = np.linalg.svd(pooled, compute_uv=False)
        kept = found.sel(scope="data", centering="raw").isel(depth=depth).dropna("order")
        np.testing.assert_allclose(kept, expected[kept["order"].values - 1])
        assert kept["order"].values[[0, -1]].tolist() == [1, 40]
        centred = np.linalg.svd(pooled - pooled.mean(0), compute_uv=False)
        kept = found.sel(scope="data", centering="centred").isel(depth=depth).dropna("order")
        np.testing.assert_allclose(kept, centred[kept["order"].values - 1])


def test_sequences_are_averaged_where_they_reach_the_order(states, mask):
    found = spectra(states, mask)
    value = found["singular_value"].sel(tokens="all", scope="sequence", centering="raw").isel(depth=0)
    each = [np.linalg.svd(states[0, s].mean(1)[mask[s]], compute_uv=False) for s in range(3)]
    assert float(value.sel(order=1)) == pytest.approx(np.mean([s[0] for s in each]))
    assert float(value.sel(order=20)) == pytest.approx(np.mean([each[0][19], each[2][19]]))
    assert value.sel(order=slice(21, None)).isnull().all()
    error = found["singular_value_stderr"].sel(tokens="all", scope="sequence", centering="raw").isel(depth=0)
    assert float(error.sel(order=1)) == pytest.approx(np.std([s[0] for s in each], ddof=1) / 3**0.5)


def test_noise_has_the_energy_of_the_states_and_the_spectrum_of_noise():
    noise = 5 * np.random.default_rng(1).standard_normal((1, 3, 200, 1, 64))
    found = spectra(noise, np.ones((3, 200), bool))
    cell = {"tokens": "all", "scope": "data", "centering": "raw"}
    value, null = (found[name].isel(depth=0).sel(cell) for name in ("singular_value", "singular_value_null"))
    np.testing.assert_allclose(value, null, rtol=0.03)
    source = Quantities(xr.Dataset({"residual": (schema.STATE, noise)}))
    ranks = source.labelled(source.variable(effective_rank.null))
    expected = float(ranks.isel(group=-1).sel(tokens="all", centering="raw"))
    whole = null.interp(order=np.arange(1, 65)).values
    share = whole / whole.sum()
    assert np.exp(-(share * np.log(share)).sum()) == pytest.approx(expected, rel=1e-3)


def test_a_sequence_without_tokens_has_no_spectrum(states, mask):
    empty = mask.copy()
    empty[2] = False
    found = spectra(states, empty)["singular_value"].sel(tokens="all", centering="raw").isel(depth=0)
    first = [np.linalg.svd(states[0, s].mean(1)[empty[s]], compute_uv=False)[0] for s in (0, 1)]
    assert float(found.sel(scope="sequence", order=1)) == pytest.approx(np.mean(first))


def test_leaving_out_a_sequence_keeps_the_orders(states, mask):
    trace = xr.Dataset({"residual": (schema.STATE, states), "mask": (("sample", "token"), mask)})
    error = jackknife(trace, [singular_value], lambda name: None)["singular_value"]
    assert error.sizes["order"] == spectra(states, mask)["singular_value"].sizes["order"]
    first = {"tokens": 0, "scope": 0, "centering": 0, "depth": 0, "order": 0}
    largest = []
    for left in range(3):
        kept = np.arange(3) != left
        rows = states[0, kept].mean(2)[mask[kept]]
        largest.append(np.linalg.svd(rows, compute_uv=False)[0])
    expected = np.sqrt(2 / 3 * ((largest - np.mean(largest)) ** 2).sum())
    assert float(error[first]) == pytest.approx(expected)


def test_few_orders_stand_for_a_large_spectrum():
    orders = stored_orders(4096)
    assert len(orders) < 64
    assert {1, 2, 4096} <= set(orders.tolist())
    assert (np.diff(orders) > 0).all()
    assert (np.diff(orders) <= np.minimum(np.maximum(0.35 * orders[1:], 1), 133)).all()


def test_padding_changes_nothing(states, mask):
    padded = np.concatenate([states, np.zeros_like(states)], axis=2)
    longer = np.concatenate([mask, np.zeros_like(mask)], axis=1)
    found, expected = spectra(padded, longer), spectra(states, mask)
    for name, value in expected.items():
        xr.testing.assert_allclose(found[name], value)
