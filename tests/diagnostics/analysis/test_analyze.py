"""The analysis computes what is asked and no more, says what is missing, and survives odd runs."""

from __future__ import annotations

import hashlib
import tracemalloc
import warnings

import numpy as np
import pytest
import xarray as xr
from array_api_compat.numpy import linalg

from depthscope import CATALOGUE, diagnostics
from depthscope.diagnostics import schema


def count_calls(monkeypatch, module, names):
    calls = dict.fromkeys(names, 0)
    for name in names:
        original = getattr(module, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            calls[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return calls


DECOMPOSITIONS = ("eigvalsh", "eigh", "svd", "svdvals", "qr", "eigvals", "cholesky")


def record_decompositions(monkeypatch):
    """A digest of every matrix that is decomposed from now on."""
    seen = []
    for name in DECOMPOSITIONS:
        original = getattr(linalg, name, None)

        def recorded(x, *args, _original=original, **kwargs):
            matrices = np.reshape(x, (-1, *x.shape[-2:]))
            seen.extend(hashlib.blake2b(matrix.tobytes()).hexdigest() for matrix in matrices)
            return _original(x, *args, **kwargs)

        if original is not None:
            monkeypatch.setattr(linalg, name, recorded)
    return seen


def test_no_state_is_decomposed_twice(make_run, monkeypatch):
    run = make_run("residual", layers=3, samples=3)
    matrices = record_decompositions(monkeypatch)
    diagnostics.analyze(run)
    # Of 4 depths, raw and centred: 3 sequences and all tokens. And the gradients of the 3 sequences.
    assert len(matrices) == 4 * (2 * (3 + 1) + 1)
    assert len(set(matrices)) == len(matrices)


@pytest.mark.parametrize(
    ("first", "second"),
    [("cka", "adjacent_cka"), ("residual_norm", "effective_rank"), ("gradient_rank", "gradient_norm")],
)
def test_a_set_of_metrics_costs_what_its_parts_need_together(make_run, monkeypatch, first, second):
    run = make_run("residual", layers=3, samples=3)
    matrices = record_decompositions(monkeypatch)
    tables = count_calls(monkeypatch, diagnostics.metrics.similarity, ["_cka"])
    diagnostics.analyze(run, metrics=[first, second])
    ranks, gradients = {"effective_rank"}, {"gradient_rank"}
    asked = {first, second}
    assert len(matrices) == 4 * 2 * (3 + 1) * bool(asked & ranks) + 4 * bool(asked & gradients)
    assert tables["_cka"] == bool(asked & {"cka", "adjacent_cka"})


def test_a_depth_is_read_once_for_all_metrics(make_run, monkeypatch):
    run = make_run("hc", layers=2)
    reads = count_calls(monkeypatch, diagnostics.quantities.states.States, ["_read"])
    diagnostics.analyze(run)
    assert reads["_read"] == 2 * 5  # residual and gradient at every depth


def test_what_does_not_fit_is_read_again_and_gives_the_same(make_run, monkeypatch):
    run = make_run("hc", layers=2)
    whole = diagnostics.analyze(run)
    states = diagnostics.quantities.states.States
    two_depths = 2 * 5 * 2 * 16 * 32 * 4  # of five views
    monkeypatch.setitem(states.__init__.__kwdefaults__, "cache_bytes", two_depths)
    reads = count_calls(monkeypatch, states, ["_read"])
    xr.testing.assert_identical(diagnostics.analyze(run), whole)
    assert reads["_read"] > 2 * 5


def test_memory_is_that_of_the_states_once_more_and_blocks_of_a_fixed_size(make_run):
    run = make_run("residual", layers=23, samples=4, tokens=64, features=256, gradients=False, weights=False)
    # CKA holds tiles of Gram matrices, of a fixed size.
    names = [name for name in CATALOGUE if "cka" not in name]
    diagnostics.analyze(run, metrics=names)
    tracemalloc.start()
    diagnostics.analyze(run, metrics=names)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * run["trace"].to_dataset().nbytes + 10e6  # and blocks of a fixed size


def test_a_run_is_not_written_to(make_run):
    run = make_run("mhc", layers=2, features=12)
    before = run.copy(deep=True)
    diagnostics.analyze(run, metrics=CATALOGUE, jackknife=True)
    xr.testing.assert_identical(run, before)


@pytest.mark.parametrize("metrics", [[None], [3], 3, ["efective_rank"]])
def test_what_is_no_name_of_a_metric_is_refused(residual_run, metrics):
    words = (
        r"got .*(None|3).*; expected .*'effective_rank'|no metric 'efective_rank'; closest: 'effective_rank'"
    )
    with pytest.raises(ValueError, match=words):
        diagnostics.analyze(residual_run, metrics=metrics)


def test_what_is_no_run_is_refused(residual_run):
    wrong = {
        "got a NoneType; expected a run, a DataTree; capture one with": None,
        r"got the path 'w.zarr.zip'; expected a run, .*ds.analyze\(ds.open_run": "w.zarr.zip",
        r"got a Dataset; expected a run, .*diagnostics.create_run\(trace": residual_run["trace"].to_dataset(),
    }
    for said, came in wrong.items():
        with pytest.raises(ValueError, match=said):
            diagnostics.analyze(came)


def test_what_cannot_be_fed_is_listed_with_its_reason(make_run):
    found = diagnostics.analyze(make_run("residual", gradients=False, layers=2))
    reasons = found.attrs["not_computed"]
    assert "gradients=True" in reasons["gradient_norm"]
    assert "one stream" in reasons["mixing_gain"]
    assert set(reasons) | set(found.data_vars) >= set(CATALOGUE)
    assert not set(reasons) & set(found.data_vars)


def test_progress_is_told(residual_run):
    told = []
    diagnostics.analyze(
        residual_run, metrics=["residual_norm", "dong_residual"], progress=lambda *now: told.append(now)
    )
    assert told == [("residual_norm", 0, 2), ("dong_residual", 1, 2), ("", 2, 2)]


def test_a_lazy_run_gives_the_same_and_stays_lazy(mhc_run, tmp_path):
    path = schema.save_run(mhc_run, tmp_path / "run.zarr")
    with schema.open_run(path) as run:
        xr.testing.assert_allclose(diagnostics.analyze(run), diagnostics.analyze(mhc_run))
        assert not run["trace"].to_dataset().variables["residual"]._in_memory


def test_an_analysis_survives_the_disk_as_metrics(hc_run, tmp_path):
    found = diagnostics.analyze(hc_run)
    run = hc_run.copy()
    run["metrics"] = found
    with schema.open_run(schema.save_run(run, tmp_path / "run.zarr.zip")) as back:
        stored = schema.chain_dataset(back, "metrics").load()
        xr.testing.assert_equal(stored, found)
        assert not stored.attrs["not_computed"]
        assert diagnostics.judge(stored) == diagnostics.judge(found)


def test_several_chains_give_a_tree(make_run):
    part = make_run("residual", layers=2)["trace"].to_dataset()
    run = schema.create_run({"encoder": part, "decoder": part}, attrs={"family": "residual", "n_streams": 1})
    tree = diagnostics.analyze(run, metrics=["residual_norm"])
    assert list(tree.children) == ["encoder", "decoder"]
    assert tree["decoder"].to_dataset()["residual_norm"].dims == ("step", "depth", "stream")
    assert tree.attrs["family"] == "residual"
    with pytest.raises(ValueError, match="several chains: encoder, decoder"):
        diagnostics.residual_norm(run)


def test_the_step_of_the_trace_is_kept(make_run):
    run = make_run("residual", layers=2)
    trace = run["trace"].to_dataset()
    for marked in (trace.assign_coords(step=70), trace.assign_attrs(step=70)):
        found = diagnostics.analyze(schema.create_run(marked, attrs=run.attrs), metrics=["residual_norm"])
        assert found["step"].values.tolist() == [70]


def test_a_run_without_a_token_says_so(make_run):
    run = make_run("mhc", layers=2)
    trace = run["trace"].to_dataset().load()
    trace["mask"].values[:] = False
    found = diagnostics.analyze(schema.create_run(trace, attrs=run.attrs))
    assert not found.data_vars
    of_tokens = {
        name: reason
        for name, reason in found.attrs["not_computed"].items()
        if CATALOGUE[name].question not in ("weight_updates", "checkpoints")
    }
    assert all("leaves no token" in reason for reason in of_tokens.values())
    assert [finding.verdict for finding in diagnostics.judge(found)] == ["nothing_measured"]


def test_an_analysis_writes_itself_and_is_judged_when_it_comes_back(mhc_run, tmp_path):
    found = diagnostics.analyze(mhc_run)
    with warnings.catch_warnings(action="ignore"):  # zarr's own, of text
        found.to_zarr(tmp_path / "a.zarr")
        back = xr.open_zarr(tmp_path / "a.zarr")
    with back:
        xr.testing.assert_allclose(back.load()["effective_rank"], found["effective_rank"])
        assert back.attrs["not_computed"] == found.attrs["not_computed"]
        assert [each.sentence for each in diagnostics.judge(back)] == [
            each.sentence for each in diagnostics.judge(found)
        ]
