"""A run measured part by part gives the numbers of the run measured at once, in threads and on the workers of dask."""

from __future__ import annotations

import numpy as np
import pytest

from depthscope import CATALOGUE, analyze, save_run
from depthscope.diagnostics.analysis import scheduled
from tests.models.synthetic_run import synthetic_run


def require_equal(found, expected, *, exact):
    """Values, dims, labels and attributes of every variable; values to the last bit, or to the rounding of sums."""
    assert list(found.data_vars) == list(expected.data_vars)
    for name, variable in expected.variables.items():
        other = found[name].variable
        assert other.dims == variable.dims, name
        assert other.attrs == variable.attrs, name
        if variable.dtype.kind not in "fiu":
            assert other.values.astype(object).tolist() == variable.values.astype(object).tolist(), name
        elif exact and "cka" not in str(name):
            np.testing.assert_array_equal(other.values, variable.values, err_msg=name)
        else:
            # CKA takes the precision that the depths it is given need, and one of them is massive.
            near = {"rtol": 1e-6, "atol": 1e-7} if "cka" in str(name) else {"rtol": 1e-8, "atol": 1e-12}
            np.testing.assert_allclose(other.values, variable.values, err_msg=name, **near)
    assert found.attrs == expected.attrs


def difficult(family, **sizes):
    """A run with a token that is massive at one depth, and in one stream a state that is not finite."""
    run = synthetic_run(family, **sizes)
    values = run.trace.residual.values
    values[2, 0, 3, 0, 5] = 1e4  # no other part sees it
    values[1, 1, -1] = np.nan if family == "residual" else values[1, 1, -1]
    return run


def test_every_metric_in_parts_is_the_metric_of_the_whole(tmp_path):
    run = difficult("mhc", layers=2)
    expected = analyze(run, metrics=list(CATALOGUE))
    path = save_run(run, tmp_path / "run.zarr")
    require_equal(analyze(path, metrics=list(CATALOGUE), scheduler="threads"), expected, exact=False)
    parts = {scheduled.part_of(CATALOGUE[name]) for name in expected.data_vars if name in CATALOGUE}
    assert parts == {"depth", "step", "pair", "whole"}


def test_states_that_are_measured_one_depth_at_a_time_give_the_same_bits():
    # Small states are measured several depths at once, whose sums are rounded otherwise.
    run = difficult("residual", layers=3, samples=2, tokens=128, features=512)
    names = [
        "effective_rank",
        "residual_norm",
        "token_cosine",
        "block_influence",
        "angular_distance",
    ]
    require_equal(analyze(run, names, scheduler="threads"), analyze(run, names), exact=True)


def test_threads_are_as_many_as_have_memory(monkeypatch):
    run = synthetic_run("residual", layers=2)
    threads = []

    class Counted(scheduled.ThreadPoolExecutor):
        def __init__(self, count):
            threads.append(count)
            super().__init__(count)

    monkeypatch.setattr(scheduled, "ThreadPoolExecutor", Counted)
    monkeypatch.setattr(scheduled.os, "cpu_count", lambda: 64)
    one_task = scheduled.DEPTHS_OF_TASK * run.trace.residual.nbytes // run.trace.sizes["depth"]
    for wanted in (1, 3):
        memory = scheduled.BYTES_OF_PYTHON + wanted * one_task
        analyze(run, "residual_norm", scheduler="threads", memory=memory)
    assert threads == [1, 3]
    with pytest.raises(
        ValueError, match=r"memory is 0.373 GiB; expected 0.\d+ GiB or more, which one task takes"
    ):
        analyze(run, "residual_norm", scheduler="threads", memory=scheduled.BYTES_OF_PYTHON)


def test_progress_and_what_does_not_go_together(tmp_path):
    run, done = synthetic_run("residual", layers=2), []
    analyze(run, ["residual_norm", "cka"], scheduler="threads", progress=lambda *state: done.append(state))
    assert done[-1][1] == done[-1][2]
    with pytest.raises(ValueError, match="a run in memory, which the workers of a cluster do not see"):
        analyze(run, scheduler=object())
    path = save_run(run, tmp_path / "run.zarr")
    with pytest.raises(ValueError, match="leave scheduler= out"):
        analyze(path, scheduler="threads", jackknife=True)
    with pytest.raises(
        ValueError, match=r"scheduler is 'everywhere'; expected 'threads' or a distributed.Client"
    ):
        analyze(path, scheduler="everywhere")
    with pytest.raises(FileNotFoundError):
        analyze(tmp_path / "nowhere.zarr", scheduler="threads")


def test_workers_of_dask_read_the_run_themselves(tmp_path):
    distributed = pytest.importorskip("distributed")
    run = difficult("residual", layers=3)
    path = save_run(run, tmp_path / "run.zarr")
    names = ["residual_norm", "token_cosine", "cka", "massive_token_fraction"]
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        require_equal(analyze(path, names, scheduler=client), analyze(run, names), exact=False)
