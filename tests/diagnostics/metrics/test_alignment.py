"""Comparisons of depths against formulas written out in numpy, and refusals in words."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from depthscope import diagnostics
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.quantities.tokens import evenly_spaced

NAMES = [name for name, metric in CATALOGUE.items() if metric.question == "alignment"]
A, B = 2, 5


@pytest.fixture(scope="module")
def run(make_run):
    return make_run("hc", layers=4, samples=3, features=12)


@pytest.fixture(scope="module")
def analysis(run):
    return diagnostics.analyze(run, metrics=NAMES).sel(tokens="all").isel(step=0)


@pytest.fixture(scope="module")
def states(run):
    trace = run.trace
    return trace.residual.mean("stream").values[:, trace.mask.values].astype(float)


@pytest.mark.parametrize("name", NAMES)
def test_a_depth_agrees_with_itself(analysis, name):
    diagonal = np.diag(analysis[name])
    np.testing.assert_allclose(diagonal, 0.0 if name == "procrustes" else 1.0, atol=1e-6)
    np.testing.assert_array_equal(analysis[name], analysis[name].T)


def test_neighbours(analysis, states):
    near = []
    for s in (states[A], states[B]):
        unit = s / np.linalg.norm(s, axis=1, keepdims=True)
        cosine = unit @ unit.T
        np.fill_diagonal(cosine, -np.inf)
        near.append(np.argsort(-cosine, axis=1)[:, :10])
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*near, strict=True)])
    assert float(analysis["mutual_knn"][A, B]) == pytest.approx(shared)
    assert float(analysis["mutual_knn_null"]) == pytest.approx(10 / (len(states[A]) - 1))


def test_too_few_tokens_are_refused_in_words():
    short = xr.DataArray(
        np.random.default_rng(0).standard_normal((2, 8, 3)), dims=("depth", "token", "feature")
    )
    with pytest.raises(ValueError, match="k is 10 for 8 rows"):
        diagnostics.mutual_knn(short)


def test_many_tokens_are_thinned_evenly(monkeypatch, run, analysis, states):
    monkeypatch.setattr("depthscope.diagnostics.metrics.alignment.ROWS", 20)
    thinned = diagnostics.analyze(run, metrics=["procrustes"])["procrustes"].sel(tokens="all").isel(step=0)
    assert float(abs(thinned - analysis["procrustes"]).max()) > 1e-3
    kept = evenly_spaced(int(run.trace.mask.sum()), 20)
    expected = diagnostics.kernels.similarity.procrustes(states[A][kept], states[B][kept])
    assert float(thinned[A, B]) == pytest.approx(float(expected), rel=1e-6)
    for count, most in ((5, 9), (9, 9), (100, 9), (1, 9), (0, 9)):
        kept = evenly_spaced(count, most)
        assert len(kept) == len(set(kept)) == min(count, most)
        assert not count or (kept[0], kept[-1]) == (0, count - 1)
