"""Runs differ only when they do: paired and unpaired tests, seeds, many depths, and what is not decided."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from depthscope import diagnostics
from depthscope.diagnostics.analysis.differences import by_sequence, holm, of_seeds, of_two, same_sequences
from depthscope.diagnostics.metrics.intervals import half_width

DEPTHS = 9


def numbers(generator, sequences: int, *, shared=None, step=0.0) -> xr.DataArray:
    """One number a sequence and depth; neighbouring depths depend on each other, as in a network."""
    own = generator.normal(size=(sequences, DEPTHS)).cumsum(axis=1) * 0.1
    offset = 0.0 if shared is None else shared[:, None]
    return xr.DataArray(own + offset + step, dims=("sequence", "depth"), coords={"depth": np.arange(DEPTHS)})


def told(sequences: int, *, step: float, paired: bool, draws: int) -> float:
    """The share of draws in which a difference is told at some depth."""
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(draws):
        shared = generator.normal(size=sequences) * 3
        a = numbers(generator, sequences, shared=shared)
        other = shared if paired else generator.normal(size=sequences) * 3
        b = numbers(generator, sequences, shared=other, step=step)
        found += bool(of_two("any", {"a": a, "b": b}, paired=paired).differs.any())
    return found / draws


@pytest.mark.parametrize(("sequences", "paired"), [(4, True), (8, False)])
def test_runs_that_do_not_differ_are_told_apart_in_at_most_one_of_twenty(sequences, paired):
    assert told(sequences, step=0.0, paired=paired, draws=400) <= 0.07


def test_pairing_finds_what_the_spread_of_the_sequences_hides():
    assert told(8, step=1.0, paired=True, draws=100) > 0.95
    assert told(8, step=1.0, paired=False, draws=100) < 0.2


@pytest.mark.parametrize(("paired", "others"), [(True, 6), (False, 9)])
def test_the_tests_are_those_of_scipy_the_unpaired_one_welchs(paired, others):
    generator = np.random.default_rng(1)
    a, b = numbers(generator, 6), numbers(generator, others, step=0.1)
    found = of_two("any", {"a": a, "b": b}, paired=paired)
    expected = stats.ttest_rel(b, a) if paired else stats.ttest_ind(b, a, equal_var=False)
    np.testing.assert_allclose(found.p, holm(expected.pvalue))
    interval = expected.confidence_interval()
    np.testing.assert_allclose(found.value - found.half_width, interval.low)
    np.testing.assert_allclose(found.value + found.half_width, interval.high)


def test_equal_runs_do_not_differ():
    a = numbers(np.random.default_rng(3), 5)
    found = of_two("any", {"a": a, "b": a}, paired=True)
    assert not found.differs.any()
    assert (found.p == 1).all()


def test_one_sequence_decides_nothing():
    generator = np.random.default_rng(4)
    found = of_two("any", {"a": numbers(generator, 1), "b": numbers(generator, 1, step=9)}, paired=True)
    assert found.undecided.startswith("one sequence")
    assert not found.differs.any()


# --- seeds


def seeds(generator, number: int, step: float) -> list[xr.DataArray]:
    return [numbers(generator, 1, step=step).isel(sequence=0) for _ in range(number)]


def test_four_seeds_of_two_designs_are_told_apart_where_no_seed_of_one_is_among_the_other():
    generator = np.random.default_rng(0)
    found = of_seeds("any", {"a": seeds(generator, 4, 0.0), "b": seeds(generator, 4, 5.0)})
    assert found.differs.all()
    np.testing.assert_allclose(found.p, 2 / 70)  # 2 of the 70 assignments are as extreme


def test_seeds_of_one_design_are_told_apart_in_at_most_one_of_twenty():
    generator = np.random.default_rng(1)
    draws = [of_seeds("any", {"a": seeds(generator, 4, 0), "b": seeds(generator, 4, 0)}) for _ in range(200)]
    assert np.mean([draw.differs.any() for draw in draws]) <= 0.07


def test_three_seeds_of_each_are_too_few_however_large_the_difference():
    generator = np.random.default_rng(2)
    found = of_seeds("any", {"a": seeds(generator, 3, 0.0), "b": seeds(generator, 3, 99.0)})
    assert "train 4 of each" in found.undecided
    assert not found.differs.any()


# --- runs


@pytest.fixture(scope="module")
def run(make_run) -> xr.DataTree:
    return make_run("residual")


@pytest.fixture(scope="module")
def trace(run) -> xr.Dataset:
    return run["trace"].to_dataset()


@pytest.mark.parametrize("name", ["effective_rank", "token_cosine"])
def test_the_mean_over_sequences_is_the_metric(run, trace, name):
    analysis = diagnostics.analyze(run, metrics=[name])
    values = by_sequence(trace, diagnostics.CATALOGUE[name]).mean("sequence").isel(stream=0)
    expected = analysis[name].isel(step=0).sel(scope="sequence", stream="mean")
    np.testing.assert_allclose(values, expected.transpose(*values.dims))


def test_pseudo_values_have_the_jackknifes_error(run, trace):
    analysis = diagnostics.analyze(run, metrics=["cka"], jackknife=True)
    values = by_sequence(trace, diagnostics.CATALOGUE["cka"], scope="data")
    error = analysis["cka_stderr"].isel(step=0)
    spread = values.std("sequence", ddof=1).transpose(*error.dims) / np.sqrt(values.sizes["sequence"])
    np.testing.assert_allclose(spread, error, atol=1e-12)
    reach = stats.t.ppf(0.975, values.sizes["sequence"] - 1)
    np.testing.assert_allclose(half_width(error), reach * error)


def test_counts_and_extremes_have_no_value_for_each_sequence(trace):
    rough = next(metric for metric in diagnostics.CATALOGUE.values() if not metric.smooth)
    assert by_sequence(trace, rough) is None


def test_only_the_same_sequences_are_paired(trace):
    assert same_sequences(trace, trace, ("a", "a"))
    assert not same_sequences(trace, trace, ("a", "b"))
    assert not same_sequences(trace, trace, (None, None))
    assert not same_sequences(trace, trace.isel(sample=[0]), ("a", "a"))
