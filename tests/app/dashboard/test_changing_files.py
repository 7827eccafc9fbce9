"""What a page shows of a run whose file is replaced, torn, deleted or turned into something else while it is open."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from depthscope.app.dashboard.state import run_library, run_reading
from depthscope.app.dashboard.state.reading_cache import ReadingCache
from depthscope.app.dashboard.state.run_library import read_run
from depthscope.app.dashboard.state.run_reading import UnreadableRun
from depthscope.diagnostics import save_run
from depthscope.diagnostics.experiments import result_path, save_result
from tests.app.dashboard.opening import open_page, words

SUFFIXES = (".zarr.zip", ".zarr")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_run) -> dict[str, list[Path]]:
    """Two runs of different depth in each format."""
    root = tmp_path_factory.mktemp("saved")
    found: dict[str, list[Path]] = {suffix: [] for suffix in SUFFIXES}
    for layers in (2, 4):
        run = make_run("residual", layers=layers, gradients=False, weights=False)
        for suffix in SUFFIXES:
            found[suffix].append(root / f"{layers}{suffix}")
            save_run(run, found[suffix][-1])
    return found


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    monkeypatch.setattr(run_library, "_roots", [root.resolve()])
    run_library._cache.clear()
    return root


def put(source: Path, place: Path) -> None:
    """Replace what is at a place, as a rename does."""
    fresh = place.parent / f".fresh{place.name}"
    (shutil.copytree if source.is_dir() else shutil.copy2)(source, fresh)
    if place.is_dir():
        old = place.parent / f".old{place.name}"
        place.rename(old)
        fresh.rename(place)
        shutil.rmtree(old)
    else:
        os.replace(fresh, place)


def depth_of(found: object) -> int:
    assert not isinstance(found, UnreadableRun), found
    return found[0].analysis.sizes["depth"] - 1


def test_a_result_that_appears_beside_a_run_is_shown(saved, root):
    put(saved[".zarr.zip"][0], root / "a.zarr.zip")
    (before,) = read_run("a")
    assert before.results == {}
    depths = xr.DataArray(np.full((1, 1, 2, 3), 1.0), dims=("lens", "stream", "sample", "token"))
    lens = xr.Dataset({"prediction_depth": depths}, {"lens": ["logit"], "depth": np.arange(3)})
    save_result(lens, result_path(root / "a.zarr.zip", "lens"))
    (after,) = read_run("a")
    assert set(after.results) == {"lens"}


def test_a_run_that_is_deleted_while_its_page_is_open_is_said(saved, root):
    place = root / "a.zarr.zip"
    put(saved[".zarr.zip"][0], place)
    test = open_page("tokens", [root], runs=["a"])
    place.unlink()
    test.run()
    assert not test.exception
    assert "Not here: “a”" in words(test)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_replaced_run_is_read_again_also_with_the_same_date_and_size(suffix, saved, root):
    place = root / f"a{suffix}"
    put(saved[suffix][0], place)
    assert depth_of(read_run("a")) == 2
    assert read_run("a") is read_run("a")
    put(saved[suffix][1], place)
    assert depth_of(read_run("a")) == 4
    if not place.is_dir():
        # A change of the date alone is a change of the inode too.
        stat = place.stat()
        before = read_run("a")
        os.utime(place, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert read_run("a") is not before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_torn_run_explains_itself_and_recovers(suffix, saved, root):
    place = root / f"a{suffix}"
    put(saved[suffix][0], place)
    assert depth_of(read_run("a")) == 2
    if place.is_dir():
        (place / "trace" / "zarr.json").write_bytes(b"{")
    else:
        os.truncate(place, place.stat().st_size // 2)
    torn = read_run("a")
    assert isinstance(torn, UnreadableRun)
    assert len(torn.reason) > 20
    test = open_page("collapse", [root])
    assert "a cannot be shown" in words(test)
    put(saved[suffix][1], place)
    assert depth_of(read_run("a")) == 4


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


def test_a_file_is_closed_whatever_happens(saved, root):
    for suffix in SUFFIXES:
        put(saved[suffix][0], root / f"{suffix[1:]}{suffix}")
    (root / "torn.zarr.zip").write_bytes(saved[".zarr.zip"][0].read_bytes()[:5000])
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(3):
        run_library._cache.clear()
        for name in run_library.list_runs():
            read_run(name)
    if before:
        opened = [
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{fd}")
        ]
        assert not [path for path in opened if str(root) in path]


# --- the cache ---


def test_the_cache_is_bounded_by_bytes_and_keeps_what_was_used_last():
    cache = ReadingCache(100, len)
    for key in "abc":
        cache.get(key, lambda: b"x" * 40)
    assert cache.num_bytes == 80
    made: list[str] = []
    cache.get("b", lambda: made.append("b"))
    assert not made
    cache.get("a", lambda: made.append("a") or b"y" * 40)  # the one used longest ago had been dropped
    assert made == ["a"]
    assert cache.get("huge", lambda: b"z" * 1000) is cache.get("huge", lambda: b"")
    assert cache.num_bytes == 1000  # alone, since the next click needs it again


def test_one_value_is_made_once_however_many_ask():
    cache = ReadingCache(10**6, len)
    made: list[int] = []

    def make() -> bytes:
        time.sleep(0.05)
        made.append(1)
        return b"x"

    threads = [threading.Thread(target=cache.get, args=("key", make)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_what_could_not_be_made_is_tried_again():
    cache = ReadingCache(10, len)
    with pytest.raises(OSError, match="gone"):
        cache.get("a", lambda: (_ for _ in ()).throw(OSError("gone")))
    assert cache.get("a", lambda: b"x") == b"x"
