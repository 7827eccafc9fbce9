"""Workers give the numbers of one process; what a lost worker measured is named, and the rest is kept."""

from __future__ import annotations

import os
import re
import time

import numpy as np
import pytest

from depthscope import CATALOGUE, analyze, save_run
from depthscope.diagnostics.analysis.analyze import analyze_saved
from depthscope.diagnostics.analysis.scheduled import scheduled, splitting, tasks
from depthscope.diagnostics.analysis.scheduled import workers as running
from depthscope.diagnostics.analysis.scheduled.workers import LostWorker, run_all, task_budget, workers
from tests.models.synthetic_run import synthetic_run

pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def client():
    with workers("threads", count=1) as client:
        yield client


def _is_equal(name, found, expected):
    assert found.dims == expected.dims, name
    if expected.dtype.kind in "fiu":
        # CKA takes the precision that the depths it is given need, and one of them is massive.
        precision = {"rtol": 1e-6, "atol": 1e-7} if "cka" in name else {"rtol": 1e-8, "atol": 1e-12}
        np.testing.assert_allclose(found.values, expected.values, err_msg=name, **precision)
    else:
        assert (
            found.values.astype(object).astype(str).tolist()
            == expected.values.astype(object).astype(str).tolist()
        )
    assert found.attrs == expected.attrs, name


@pytest.mark.slow(more=1)
@pytest.mark.parametrize("family", ["residual", "mhc"])
def test_every_metric_in_blocks_is_the_metric_of_the_whole(family, client, monkeypatch, tmp_path):
    # One depth, pair, connection or sequence a task: a metric that looks further must not be cut.
    monkeypatch.setattr(splitting, "blocks_of", lambda count, size: [[number] for number in range(count)])
    run = synthetic_run(family, layers=3 if family == "residual" else 1)
    values = run.trace.residual.values
    values[2, 0, 3, 0, 5] = 1e4  # massive at one depth: no other block sees it
    values[1, 1, -1] = np.nan if family == "residual" else values[1, 1, -1]
    path = save_run(run, tmp_path / "run.zarr")
    expected = analyze(run, metrics=list(CATALOGUE))
    found = analyze(path, metrics=list(CATALOGUE), scheduler=client)
    assert list(found.data_vars) == list(expected.data_vars)
    for name, variable in expected.variables.items():
        _is_equal(name, found[name], expected.get(name, variable))
    assert found.attrs == expected.attrs
    kinds = {tasks.separable_by(CATALOGUE[name]) for name in expected.data_vars if name in CATALOGUE}
    assert kinds == set(tasks.KINDS) - ({"connection"} if family == "residual" else set())


def test_several_runs_and_a_run_in_memory(client, tmp_path):
    runs = {name: synthetic_run("residual", layers=2, seed=seed) for name, seed in (("a", 0), ("b", 1))}
    paths = {name: save_run(run, tmp_path / f"{name}.zarr.zip") for name, run in runs.items()}
    done = []
    found = analyze_saved(
        paths, scheduler=client, metrics=["residual_norm", "cka"], progress=lambda *state: done.append(state)
    )
    for name, run in runs.items():
        expected = analyze(run, metrics=["residual_norm", "cka"])
        np.testing.assert_allclose(found[name].cka, expected.cka, rtol=1e-9)
        np.testing.assert_array_equal(found[name].residual_norm, expected.residual_norm)
    assert done[-1][1] == done[-1][2]
    with pytest.raises(ValueError, match="a run in memory, which the workers of a cluster do not see"):
        analyze(runs["a"], scheduler=client)
    with pytest.raises(ValueError, match="leave scheduler= out"):
        analyze(paths["a"], scheduler=client, jackknife=True)
    with pytest.raises(ValueError, match="expected 'threads'"):
        analyze(paths["a"], scheduler="everywhere")


def _split(run, names, budget):
    return splitting.tasks_of(splitting.Chain("r", "r.zarr", "", run.trace.to_dataset(), budget), names)


def test_a_block_is_as_large_as_a_task_may_be():
    run = synthetic_run("mhc", layers=4)
    one_depth = run.trace.residual.nbytes // run.trace.sizes["depth"]
    names = ["token_cosine", "adjacent_cosine", "cka", "mixing_gain", "effective_depth"]
    # Two depths and the one before are kept, beside what one of them takes in float64.
    found, refused = _split(run, names, 6 * one_depth + 3 * one_depth * 5 // 4)
    assert refused == {}
    kinds = {kind: [task for task in found if task.kind == kind] for kind in tasks.KINDS}
    assert [depth for task in kinds["depth"] for depth in task.keep] == list(range(9))
    assert max(len(task.keep) for task in kinds["depth"]) == 2
    assert all(len(task.positions) == len(task.keep) + 1 for task in kinds["depth"][1:])
    assert {position for task in kinds["connection"] for position in task.keep} == set(range(8))
    assert [task.keep for task in kinds["sequence"]] == [(0,), (1,)]


def test_what_fits_in_no_part_is_refused_with_its_bytes():
    run = synthetic_run("mhc", layers=4)
    one_depth = run.trace.residual.nbytes // run.trace.sizes["depth"]
    found, refused = _split(run, ["residual_norm", "intrinsic_dimension", "composite_gain"], 9 * one_depth)
    assert {name for task in found for name in task.metrics} == {"residual_norm", "composite_gain"}
    assert list(refused) == ["intrinsic_dimension"]
    assert re.fullmatch(
        r"it takes about \S+ GiB for one depth, and a worker has \S+ GiB for a task: .*",
        refused["intrinsic_dimension"],
    )


def test_what_a_lost_worker_measured_is_named_and_the_rest_is_kept(client, monkeypatch, tmp_path):
    path = save_run(synthetic_run("residual", layers=2), tmp_path / "a.zarr.zip")

    def losing(client, function, arguments, report):
        results = run_all(client, function, arguments, report)
        is_lost = [
            isinstance(of[0], tasks.Task) and "token_cosine" in of[0].metrics and len(arguments)
            for of in arguments
        ]
        return [LostWorker("killed") if lost else of for lost, of in zip(is_lost, results, strict=True)]

    monkeypatch.setattr(scheduled, "run_all", losing)
    found = analyze(path, scheduler=client, metrics=["token_cosine", "dirichlet_energy"])
    assert {str(name).partition("_null")[0].partition("_stderr")[0] for name in found.data_vars} == {
        "dirichlet_energy"
    }
    reason = found.attrs["not_computed"]["token_cosine"]
    assert "the worker was lost" in reason
    assert "token_cosine at depths 0 to" in reason
    assert str(path) in reason


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def test_a_cluster_without_workers_or_of_another_version_is_told(client, monkeypatch, tmp_path):
    monkeypatch.setattr(running, "DEPTHSCOPE", "0.0.1")
    with pytest.raises(ValueError, match=r"1 of 1 workers have another depthscope: .* and 0\.0\.1 here"):
        running.require_same_version(client)
    monkeypatch.setattr(running, "SECONDS_WITHOUT_WORKERS", 0.1)
    monkeypatch.setattr(client, "scheduler_info", lambda **_: {"workers": {}})
    with pytest.raises(OSError, match=r"the cluster has had no worker for 0\.1 s"):
        run_all(client, _sleep, [(0.5,)], lambda done: None)
    monkeypatch.undo()
    missing = scheduled.ChainOfRun("a", str(tmp_path / "a.zarr.zip"), "", {})
    with pytest.raises(FileNotFoundError, match=r"a worker does not find the run .*a\.zarr.zip"):
        run_all(client, tasks.find_facts, [(missing.path, "", {}, [0], False)], lambda done: None)


def _die(number: int) -> int:
    if number == 1:
        os._exit(1)
    return number


@pytest.mark.slow
def test_a_worker_that_dies_is_told_and_the_others_go_on():
    with workers("processes", count=1, memory=2**30) as client:
        assert task_budget(client) < 2**30
        results = run_all(client, _die, [(0,), (1,), (2,)], lambda done: None)
    assert (results[0], results[2]) == (0, 2)
    assert isinstance(results[1], LostWorker)
