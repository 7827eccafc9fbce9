"""Which files may be opened, and what is shown of one that is replaced, torn or deleted, or analysed by another process?"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from depthscope.app.dashboard.components.page import MOST_RUNS
from depthscope.app.dashboard.state import run_library, run_reading
from depthscope.app.dashboard.state.run_library import read_run
from depthscope.app.dashboard.state.run_reading import READINGS, Analyses, Cache, UnreadableRun, version_of
from depthscope.app.readings.kept_readings import kept_summaries
from depthscope.diagnostics import analyze, save_run, schema
from depthscope.diagnostics.experiments import result_path, save_result
from depthscope.diagnostics.schema import COMPLETE
from tests.app.dashboard.opening import open_page, words

SUFFIXES = (".zarr.zip", ".zarr")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_run) -> dict[str, list[Path]]:
    """Two runs of different depth in each format."""
    root = tmp_path_factory.mktemp("formats")
    found: dict[str, list[Path]] = {suffix: [] for suffix in SUFFIXES}
    for layers in (2, 4):
        run = make_run("residual", layers=layers, gradients=False, weights=False)
        for suffix in SUFFIXES:
            found[suffix].append(root / f"{layers}{suffix}")
            save_run(run, found[suffix][-1])
    return found


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    monkeypatch.setattr(run_library, "_roots", [root.resolve()])
    READINGS.forget()
    return root.resolve()


def put(source: Path, place: Path) -> None:
    """Replace what is at a place, as a rename does."""
    fresh = place.parent / f".fresh{place.name}"
    (shutil.copytree if source.is_dir() else shutil.copy2)(source, fresh)
    if place.is_dir():
        shutil.rmtree(place)
    os.replace(fresh, place)


def depth_of(found: object) -> int:
    assert not isinstance(found, UnreadableRun), found
    return found[0].analysis.sizes["depth"] - 1


def test_only_what_lies_below_the_roots_is_listed(root, saved):
    put(saved[".zarr.zip"][0], root / "a.zarr.zip")
    (root / "link.zarr.zip").symlink_to(saved[".zarr.zip"][1])
    assert list(run_library.list_runs()) == ["a"]
    outside = read_run("../../etc/passwd")
    assert isinstance(outside, UnreadableRun)
    assert "not below the paths" in outside.reason


def test_a_result_that_appears_beside_a_run_is_shown(saved, root):
    put(saved[".zarr.zip"][0], root / "a.zarr.zip")
    (before,) = read_run("a")
    assert before.results == {}
    depths = xr.DataArray(np.full((1, 2, 3), 1.0), dims=("stream", "sample", "token"))
    lens = xr.Dataset({"prediction_depth": depths}, {"depth": np.arange(3)})
    save_result(lens, result_path(root / "a.zarr.zip", "lens"))
    (after,) = read_run("a")
    assert set(after.results) == {"lens"}


def test_a_run_that_is_deleted_while_its_page_is_open_is_said(saved, root):
    place = root / "a.zarr.zip"
    put(saved[".zarr.zip"][0], place)
    test = open_page("microscope", [root], runs=["a"])
    place.unlink()
    test.run()
    assert not test.exception
    assert "Not here: “a”" in words(test)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_replaced_or_torn_run_is_read_again(suffix, saved, root):
    place = root / f"a{suffix}"
    put(saved[suffix][0], place)
    assert depth_of(read_run("a")) == 2
    assert read_run("a") is read_run("a")
    if place.is_dir():
        (place / "trace" / "zarr.json").write_bytes(b"{")
    else:
        os.truncate(place, place.stat().st_size // 2)
    torn = read_run("a")
    assert isinstance(torn, UnreadableRun)
    assert len(torn.reason) > 20
    put(saved[suffix][1], place)
    assert depth_of(read_run("a")) == 4
    if not place.is_dir():
        # A change of the date alone is a change of the inode too.
        stat = place.stat()
        before = read_run("a")
        os.utime(place, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert read_run("a") is not before


def test_a_run_that_changes_during_both_readings_is_said_to_change(saved, root, monkeypatch):
    place = root / "a.zarr.zip"
    put(saved[".zarr.zip"][0], place)
    read = run_reading.read_runs
    turn = iter(range(1, 100))

    def read_while_it_is_replaced(runs: dict[str, xr.DataTree], **options):
        put(saved[".zarr.zip"][next(turn) % 2], place)
        return read(runs, **options)

    monkeypatch.setattr(run_reading, "read_runs", read_while_it_is_replaced)
    found = read_run("a")
    assert isinstance(found, UnreadableRun)
    assert "changes while it is read" in found.reason


def test_a_choice_of_too_many_runs_is_bounded_and_the_limit_is_said(root, saved):
    names = [f"run{number:02}" for number in range(MOST_RUNS + 5)]
    run = schema.open_run(saved[".zarr.zip"][0]).load()
    run["metrics"] = analyze(run, metrics=["residual_norm"]).assign_attrs({COMPLETE: True})
    save_run(run, root / f"{names[0]}.zarr.zip")
    for name in names[1:]:
        shutil.copy(root / f"{names[0]}.zarr.zip", root / f"{name}.zarr.zip")
    test = open_page("streams", [root], runs=names)
    assert len(test.multiselect(key="runs").value) == MOST_RUNS
    assert f"At most {MOST_RUNS} of the {MOST_RUNS + 5} runs" in words(test)


def test_the_cache_is_bounded_by_bytes_and_keeps_what_was_used_last():
    cache = Cache(100, len)
    for key in "abc":
        cache.get(key, lambda: b"x" * 40)
    made: list[str] = []
    cache.get("b", lambda: made.append("b"))
    assert not made
    cache.get("a", lambda: made.append("a") or b"y" * 40)  # the one used longest ago had been dropped
    assert made == ["a"]
    assert cache.get("huge", lambda: b"z" * 1000) is cache.get("huge", lambda: b"")
    assert cache.peek("a") is None  # the huge one is alone, since the next click needs it again
    with pytest.raises(OSError, match="gone"):
        cache.get("lost", lambda: (_ for _ in ()).throw(OSError("gone")))
    assert cache.get("lost", lambda: b"x") == b"x"


# --- analyses by other processes


@pytest.fixture(autouse=True)
def _no_server_of_forks(monkeypatch):
    """One would outlive the folder for temporary files of the tests."""
    monkeypatch.setattr(run_reading, "_context", multiprocessing.get_context("spawn"))


def until(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_run_is_analysed_elsewhere_and_found_here(root, saved, monkeypatch):
    put(saved[".zarr.zip"][0], root / "a.zarr.zip")
    (root / "torn.zarr.zip").write_bytes(b"nonsense")
    analyses = Analyses(most=1)
    monkeypatch.setattr(run_library, "elsewhere", analyses)
    monkeypatch.setattr(run_library, "read", None)  # not by this process
    listed = run_library.list_runs()
    for name, path in listed.items():
        assert run_library.summaries_of(name, path, ask=True).waits
    until(lambda: all(analyses.result_of(path, version_of(path)) is not None for path in listed.values()))
    (summary,) = run_library.summaries_of("a", listed["a"])
    assert summary.name == "a"
    assert kept_summaries(listed["a"], version_of(listed["a"]))
    torn = run_library.summaries_of("torn", listed["torn"])
    assert isinstance(torn, UnreadableRun)
    assert "cannot be read" in torn.reason
    # Who wants to see a run hears that it is analysed, before all others, until it is there.
    READINGS.forget()
    os.utime(listed["a"], ns=(0, 10**18))
    waiting = run_library.read_run("a")
    assert isinstance(waiting, UnreadableRun)
    assert waiting.waits
    until(lambda: not isinstance(run_library.read_run("a"), UnreadableRun))
    (reading,) = run_library.read_run("a")
    assert reading.analysis.sizes["depth"] == 3


def test_a_process_that_gives_no_answer_is_said_and_others_go_on(root, saved, monkeypatch):
    path = root / "a.zarr.zip"
    put(saved[".zarr.zip"][0], path)
    analyses = Analyses(most=1)
    begin = run_reading._context.Process.start

    def killed(process):
        begin(process)
        os.kill(process.pid, signal.SIGKILL)

    def not_started(process):
        raise OSError("no memory for another process")

    ends = {
        "was ended, perhaps for its memory. Analyse it by itself: depthscope analyze": killed,
        "No process could be started to analyse it: no memory for another process": not_started,
        "": begin,
    }
    for number, (said, how) in enumerate(ends.items()):
        monkeypatch.setattr(run_reading._context.Process, "start", how)
        os.utime(path, ns=(0, 10**18 + number))  # another version is another chance
        analyses.ask({"a": path})
        until(lambda: analyses.result_of(path, version_of(path)) is not None)
        reason = analyses.result_of(path, version_of(path))
        assert said in reason
        assert bool(reason) == bool(said)
