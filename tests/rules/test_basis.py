"""Which numbers depend on a choice of basis? Each metric is measured before and after a change of it.

Features are rotated, x → x Q. The streams are mixed anew at every depth, which a model can undo in its weights:
x_l → S_l x_l, H_res → S_{l+1} H_res S_l⁻¹, H_pre → H_pre S_l⁻¹, H_post → S_{l+1} H_post.
"""

from __future__ import annotations

import numpy as np
import pytest

from depthscope import CATALOGUE, diagnostics
from depthscope.diagnostics import schema

# Metrics of statistics are left out: a change of the trace does not move them.
OF_THE_TRACE = [name for name, metric in CATALOGUE.items() if set(metric.roots) <= set(schema.TRACE)]
# Relative changes: float64 rounds below the first, and a number that depends on the basis moves by more than the second.
# Between the two the test fails. Heuristic.
SAME, MOVED = 1e-9, 1e-5


def double(run):
    """The trace in float64, with a flat stream, a massive activation and zeros, so that their numbers can move."""
    trace = run["trace"].to_dataset().load()
    # In float32 the rounding of a rotation would look like a dependence on the basis.
    wide = {name: value.astype(float) for name, value in trace.data_vars.items() if value.dtype.kind == "f"}
    trace = trace.assign(wide)
    states, rng = trace["residual"].values, np.random.default_rng(7)
    states[2, :, :, -1] = rng.standard_normal((*states.shape[1:3], 2)) @ rng.standard_normal(
        (2, states.shape[-1])
    )
    # Above 1000 medians; after a rotation, which spreads it over all features, no longer.
    states[1, :, 0, 0, :2] = 0.0
    states[3, 0, 5, 0, 3] = 1300 * np.median(abs(states[3]))
    return trace


def rotated(trace):
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((trace.sizes["feature"],) * 2))[0]
    states = [name for name in ("residual", "gradient", "branch_in", "branch_out") if name in trace]
    return trace.assign({name: trace[name].copy(data=trace[name].values @ rotation) for name in states})


def mixed(trace):
    rng, n = np.random.default_rng(2), trace.sizes["stream"]
    s = np.eye(n) + 0.3 * rng.standard_normal((trace.sizes["depth"], n, n))
    inverse = np.linalg.inv(s)
    left = {
        "residual": np.einsum("lij,lstjd->lstid", s, trace["residual"]),
        # The transpose of the inverse: ⟨gradient, change of the state⟩ is the change of the loss in any basis.
        "gradient": np.einsum("lji,lstjd->lstid", inverse, trace["gradient"]),
        "h_res": np.einsum("lij,lstjk,lkm->lstim", s[1:], trace["h_res"], inverse[:-1]),
        "h_pre": np.einsum("lsti,lij->lstj", trace["h_pre"], inverse[:-1]),
        "h_post": np.einsum("lij,lstj->lsti", s[1:], trace["h_post"]),
    }
    return trace.assign({name: trace[name].copy(data=values) for name, values in left.items()})


@pytest.fixture(scope="module")
def analyses(make_run):
    run = make_run("hc", layers=2, samples=3, features=20)
    trace = double(run)
    versions = {"as it is": trace, "feature": rotated(trace), "stream": mixed(trace)}
    return {
        name: diagnostics.analyze(schema.create_run(each, attrs=run.attrs), metrics=OF_THE_TRACE)
        for name, each in versions.items()
    }


def moves(analyses, name, basis):
    """Whether a metric of all tokens moves with a basis; what is neither the same nor clearly another fails."""
    before, after = (analyses[version][name] for version in ("as it is", basis))
    if "tokens" in before.dims:  # which tokens are massive depends on the features
        before, after = before.sel(tokens="all"), after.sel(tokens="all")
    # Undefined in one of the bases only is a dependence too.
    if (before.isnull() != after.isnull()).any():
        return True
    change = float(abs(after - before).max() / abs(before).max())
    assert change < SAME or change > MOVED, change
    return change > MOVED


def test_a_metric_says_on_which_basis_it_depends(analyses):
    for name in OF_THE_TRACE:
        with_features, with_streams = (moves(analyses, name, basis) for basis in ("feature", "stream"))
        found = "feature" if with_features else "stream" if with_streams else "invariant"
        assert CATALOGUE[name].basis == found


def test_of_one_stream_only_what_depends_on_the_features_moves(make_run):
    run = make_run("residual", layers=3, samples=3, features=20)
    trace = double(run)
    of_states = [name for name in OF_THE_TRACE if set(CATALOGUE[name].roots) <= {"residual", "gradient"}]
    versions = {"as it is": trace, "feature": rotated(trace)}
    found = {
        version: diagnostics.analyze(schema.create_run(each, attrs=run.attrs), metrics=of_states)
        for version, each in versions.items()
    }
    moved = {name for name in of_states if name in found["feature"] and moves(found, name, "feature")}
    assert moved == {name for name in of_states if CATALOGUE[name].basis == "feature"}
