"""A live store: what was written is read, whatever happened to the writer, and nothing that was not."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import xarray as xr

from depthscope.diagnostics import analyze, schema
from depthscope.diagnostics.schema import live_store, live_store_frames
from depthscope.diagnostics.schema.live_store import LiveStore
from depthscope.diagnostics.schema.live_store_frames import frames_from
from depthscope.diagnostics.schema.live_store_history import read_history
from tests.diagnostics.schema.live_logs import begins, chained, payloads, row, written

DOORS = (schema.open_run, schema.FollowedStore, lambda path: LiveStore(path, resume=True))
SMALL = {"layers": 2, "samples": 2, "tokens": 4, "features": 8}


@pytest.fixture(scope="module")
def one_step(make_run) -> xr.DataTree:
    """A run of one step, as a recorder saves it."""
    run = make_run("residual", **SMALL)
    run.attrs["step"] = int(run.statistics.step.values[-1])
    return run


def require_rows(run: xr.DataTree, steps) -> None:
    np.testing.assert_array_equal(run.statistics.step.values, list(steps))
    np.testing.assert_array_equal(run.statistics.token_count.values, list(map(float, steps)))
    np.testing.assert_array_equal(run.statistics.norm_sum.values[:, 2, 0], list(map(float, steps)))


def status_of(run: xr.DataTree) -> dict[str, object]:
    return run.attrs[schema.LIVE]


# --- growing, killed, finished


def test_a_growing_a_killed_and_a_finished_store_are_told_apart(one_step, tmp_path):
    store = written(tmp_path / "a", one_step)
    for state, end in (("growing", lambda: None), ("killed", store.close)):
        end()
        with schema.open_run(tmp_path / "a") as run:
            require_rows(run, range(5))
            status = status_of(run)
            assert (status["state"], status["last_step"], status["num_rows"]) == (state, 4, 5)
            assert status["pid"] == os.getpid()
            assert 0 <= status["age_seconds"] < 60
            # What has no step is of the saved state.
            np.testing.assert_array_equal(run.trace.residual.values, one_step.trace.residual.values)
    store = written(tmp_path / "a", one_step, [5], resume=True)
    store.finish()
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(6))
        assert status_of(run)["state"] == "finished"
        assert run.attrs[schema.RESUMED_AT] == [5]
        # A copy is a run like any other.
        copy = schema.save_run(run, tmp_path / "a.zarr.zip")
    with schema.open_run(copy) as run:
        require_rows(run, range(6))
        assert schema.LIVE not in run.attrs


def test_a_store_of_another_machine_is_neither_killed_nor_growing(one_step, tmp_path, monkeypatch):
    written(tmp_path / "a", one_step).close()
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    with schema.open_run(tmp_path / "a") as run:
        assert status_of(run)["state"] == "unknown"


def test_a_store_without_a_finished_step_says_so(one_step, tmp_path):
    store = LiveStore(tmp_path / "a")
    with pytest.raises(schema.SchemaError, match=r"no step was finished in it yet \(growing"):
        schema.open_run(tmp_path / "a")
    store.save_state(one_step)
    with pytest.raises(schema.SchemaError, match="no step was finished"):
        schema.open_run(tmp_path / "a")
    store.remove()
    assert not (tmp_path / "a").exists()


def test_live_stores_are_listed_and_judged_like_other_runs(one_step, tmp_path):
    written(tmp_path / "runs" / "a", one_step).close()
    schema.save_run(one_step, tmp_path / "runs" / "b.zarr.zip")
    assert list(schema.list_runs(tmp_path / "runs")) == ["a", "b"]
    assert list(schema.list_runs(tmp_path / "runs" / "a")) == ["a"]
    with schema.open_run(tmp_path / "runs" / "a") as run:
        analysis = analyze(run, metrics=["effective_rank", "residual_norm"])
        assert analysis.step.values == one_step.attrs["step"]
        assert schema.chain_dataset(run, "statistics").attrs[schema.POOLED_STEP] == one_step.attrs["step"]


# --- rows


def test_a_variable_may_come_later_and_be_missing_later(one_step, tmp_path):
    store = written(tmp_path / "a", one_step)
    late = {**row(5.0), "metrics/mine": ("depth", np.arange(3.0, dtype=np.float32), {"units": "1"})}
    store.append(
        5, late, coords={"metrics/depth": ("depth", [0, 1, 2]), "metrics/site": ("depth", ["a", "b", "c"])}
    )
    store.append(6, row(6.0))
    with pytest.raises(ValueError, match=r"metrics/mine has the shape \(4,\), expected \(3,\)"):
        store.append(7, {**row(7.0), "metrics/mine": np.zeros(4)})
    with pytest.raises(ValueError, match="metrics/other is new and has no dims"):
        store.append(7, {"metrics/other": np.zeros(4)})
    with pytest.raises(ValueError, match=r"'elsewhere/x' is not a name"):
        store.append(7, {"elsewhere/x": ((), 1.0)})
    store.note({"complete": True}, "metrics")
    store.close()
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(7))
        mine = run.metrics.mine
        assert mine.dtype == np.float32
        assert mine.attrs == {"units": "1"}
        np.testing.assert_array_equal(mine.values[5], [0, 1, 2])
        assert np.isnan(mine.values[[0, 4, 6]]).all()
        assert run.metrics.site.values.tolist() == ["a", "b", "c"]
        assert run.metrics.attrs["complete"] is True


def test_rows_become_columns_that_are_read_alone(one_step, tmp_path, monkeypatch):
    monkeypatch.setattr(live_store, "MAX_LOG_ROWS", 4)
    store = written(tmp_path / "a", one_step, range(11))
    assert len(list((tmp_path / "a" / "columns").iterdir())) == 2
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(11))
        np.testing.assert_array_equal(run.statistics.norm_sum[9].values, np.full((3, 1), 9.0))
    # One damaged column does not take the others with it.
    file = tmp_path / "a" / "columns" / "000001.cols"
    content = bytearray(file.read_bytes())
    place = content.index(np.full((3, 1), 2.0).tobytes())
    content[place] ^= 1
    file.write_bytes(content)
    with schema.open_run(tmp_path / "a") as run:
        np.testing.assert_array_equal(run.statistics.token_count.values, np.arange(11.0))
        with pytest.raises(schema.SchemaError, match=r"000001\.cols: bytes \d+ to \d+ are damaged"):
            _ = run.statistics.norm_sum.values
    # A file that the log names is missing.
    file.unlink()
    with pytest.raises(schema.SchemaError, match=r"a file of its older rows is missing: .*\.cols"):
        schema.open_run(tmp_path / "a")
    store.close()


def test_a_resumed_training_has_no_step_twice(one_step, tmp_path, monkeypatch):
    monkeypatch.setattr(live_store, "MAX_LOG_ROWS", 4)
    written(tmp_path / "a", one_step, range(11)).close()
    # An attempt that measures nothing supersedes nothing.
    written(tmp_path / "a", one_step, [], resume=True).close()
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(11))
    # Back into the columns: steps 6 to 10 were of weights that are gone.
    written(tmp_path / "a", one_step, [6, 7, 8, 9], resume=True).close()
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(10))
        assert status_of(run)["resumed"] == [{"step": 6, "superseded": 5}]
    # And once more, to before everything.
    store = written(tmp_path / "a", one_step, [0, 1, 2, 3, 4, 5], resume=True)
    store.finish()
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(6))
        assert run.attrs[schema.RESUMED_AT] == [6, 0]


# --- torn, damaged, hostile


def test_a_torn_tail_is_ignored_and_overwritten(one_step, tmp_path):
    written(tmp_path / "a", one_step).close()
    log = tmp_path / "a" / schema.LOG
    whole = log.read_bytes()
    last = begins(whole)[-1]
    for size in range(last + 1, len(whole)):
        log.write_bytes(whole[:size])
        history = read_history(tmp_path / "a")
        assert (history.last_step, history.torn) == (3, size - last)
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(4))
        assert status_of(run)["torn_bytes"] == len(whole) - 1 - last
    log.write_bytes(whole[:-1] + bytes(300))  # what a power cut leaves
    written(tmp_path / "a", one_step, [4, 5], resume=True).close()
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(6))
        assert status_of(run)["torn_bytes"] == 0


def test_damage_before_the_end_is_named_and_what_is_before_it_can_be_read(one_step, tmp_path):
    written(tmp_path / "a", one_step).close()
    log = tmp_path / "a" / schema.LOG
    whole = log.read_bytes()
    third = [
        at
        for at, frame in zip(begins(whole), frames_from(whole), strict=True)
        if frame.kind == live_store_frames.ROW
    ][2]
    # A wrong number, a wrong length, a wrong beginning.
    for place in (third + 40, third + 8, third + 15, third):
        damaged = bytearray(whole)
        damaged[place] ^= 0x41
        log.write_bytes(damaged)
        with pytest.raises(
            schema.SchemaError,
            match=rf"damaged at byte {third}, in row 2",
        ):
            schema.open_run(tmp_path / "a")
    with pytest.raises(schema.SchemaError, match="damaged at byte"):
        LiveStore(tmp_path / "a", resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "has version 3, this depthscope reads version 2"),
        ({"format": "another"}, "its format is 'another'"),
        (
            {
                "variables": {
                    "statistics/x": {"dims": ["depth"], "shape": [1 << 40], "dtype": "<f8", "attrs": {}}
                }
            },
            "has 8796093022208 bytes per row",
        ),
        (
            {"variables": {"statistics/x": {"dims": ["step"], "shape": [1], "dtype": "<f8", "attrs": {}}}},
            "has the dims",
        ),
        (
            {"variables": {"statistics/x": {"dims": ["depth"], "shape": [-1], "dtype": "<f8", "attrs": {}}}},
            r"has the shape \[-1\]",
        ),
        (
            {"variables": {"statistics/x": {"dims": [], "shape": [], "dtype": "O", "attrs": {}}}},
            "has the dtype 'O'",
        ),
        ({"variables": {"/etc/x": {"dims": [], "shape": [], "dtype": "<f8", "attrs": {}}}}, "is not a name"),
        ({"columns": [["../../x", 4, 0, 0, 4, 0, 3]]}, "described as"),
        ({"columns": [[7, 4]]}, "is none that depthscope writes"),
        ({"columns": [[7, 4, 0, 0, 4, -9, -3]]}, r"000007\.cols is not among its files"),
        (
            {
                "columns": [[7, 4, 0, 0, 4, -9, -3]],
                "files": ["columns/000007.cols", "states/000001.zarr.zip"],
            },
            "a file of its older rows is missing",
        ),
        ({"files": ["../../x"]}, "is not a file of a live store"),
        ({"attempts": 3}, "is none that depthscope writes"),
        ({"run": "7"}, "the run's id is '7'"),
        ({"created": 3}, "is none that depthscope writes"),
    ],
)
def test_what_no_log_begins_with_is_refused(one_step, tmp_path, change, message):
    written(tmp_path / "a", one_step).close()
    log = tmp_path / "a" / schema.LOG
    whole = log.read_bytes()
    (kind, first), *others = payloads(whole)
    begin = json.loads(first) | change
    log.write_bytes(chained([(kind, json.dumps(begin).encode()), *others]))
    with pytest.raises(schema.SchemaError, match=message):
        schema.open_run(tmp_path / "a")


def test_a_declared_size_without_rows_takes_no_memory(one_step, tmp_path):
    store = written(tmp_path / "a", one_step)
    frame = {
        "variables": {"statistics/x": {"dims": ["x"], "shape": [1 << 36], "dtype": "<f8", "attrs": {}}},
        "coords": {},
    }
    store.close()
    log = tmp_path / "a" / schema.LOG
    known = payloads(log.read_bytes())
    log.write_bytes(chained([*known, (live_store_frames.DECLARE, json.dumps(frame).encode())]))
    for door in DOORS:
        with pytest.raises(schema.SchemaError, match=r"statistics/x has 549755813888 bytes per row"):
            door(tmp_path / "a")
    # Of a size that a row may have, with rows that have none of it.
    frame["variables"]["statistics/x"]["shape"] = [25 << 20]
    log.write_bytes(chained([*known, (live_store_frames.DECLARE, json.dumps(frame).encode())]))
    for door in DOORS[:2]:
        with pytest.raises(schema.SchemaError, match=r"need .* bytes, more than"):
            door(tmp_path / "a")


def test_links_pipes_and_files_of_others_are_refused(one_step, tmp_path):
    written(tmp_path / "a", one_step).close()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(schema.SchemaError, match=r"contains notes\.txt"):
        schema.open_run(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").unlink()
    outside = tmp_path / "outside.zarr.zip"
    state = tmp_path / "a" / "states" / "000001.zarr.zip"
    os.replace(state, outside)
    state.symlink_to(outside)
    with pytest.raises(schema.SchemaError, match=r"contains states/000001\.zarr.zip"):
        schema.open_run(tmp_path / "a")
    state.unlink()
    os.mkfifo(state)
    with pytest.raises(schema.SchemaError, match=r"contains states/000001\.zarr.zip"):
        schema.open_run(tmp_path / "a")


# --- writers


def test_a_store_that_is_there_is_kept_without_resume_or_force(one_step, tmp_path):
    written(tmp_path / "a", one_step).close()
    with pytest.raises(FileExistsError, match=r"has a run already; go on in it with resume=True"):
        LiveStore(tmp_path / "a")
    LiveStore(tmp_path / "a", force=True).close()
    with pytest.raises(schema.SchemaError, match="no step was finished"):
        schema.open_run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("mine")
    for options in ({}, {"resume": True}, {"force": True}):
        with pytest.raises(FileExistsError, match=r"contains thesis\.tex"):
            LiveStore(tmp_path / "b", **options)
    (tmp_path / "c").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file, but a live run is a folder"):
        LiveStore(tmp_path / "c", force=True)


def test_one_writer_at_a_time_and_a_killed_one_holds_nothing(one_step, tmp_path):
    store = written(tmp_path / "a", one_step)
    for options in ({"resume": True}, {"force": True}):
        with pytest.raises(
            BlockingIOError, match=rf"is being written by another recorder \(process {os.getpid()} on"
        ):
            LiveStore(tmp_path / "a", **options)
    store.close()
    code = (
        "import sys, time; from depthscope.diagnostics.schema.live_store import LiveStore; "
        "store = LiveStore(sys.argv[1], resume=True); print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(BlockingIOError, match=rf"process {other.pid} on"):
            LiveStore(tmp_path / "a", resume=True)
        other.send_signal(signal.SIGKILL)
    LiveStore(tmp_path / "a", resume=True).close()


def test_a_child_of_the_writer_does_not_hold_its_lock(one_step, tmp_path):
    store = written(tmp_path / "a", one_step)
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        with pytest.raises(BlockingIOError):  # the child's copy was closed, and not the lock released
            LiveStore(tmp_path / "a", resume=True)
        store.close()
        LiveStore(tmp_path / "a", resume=True).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_full_disk_leaves_the_store_as_it_was(one_step, tmp_path, monkeypatch):
    store = written(tmp_path / "a", one_step)
    write = os.write

    def full(descriptor: int, content) -> int:
        if len(content) > 100:
            return write(descriptor, bytes(content[:100]))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            store.append(5, row(5.0))
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(5))
    store.append(5, row(5.0))
    store.close()
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(6))


def test_an_interrupt_between_writing_and_counting_loses_nothing(one_step, tmp_path):
    store = written(tmp_path / "a", one_step)
    tail = store._log._tail
    store.append(5, {**row(5.0), "statistics/new": ((), 1.0)})
    # As if Ctrl-C had come right after the write: neither the bytes nor the new variable are known to the writer.
    store._log._tail = tail
    del store._history.variables["statistics/new"]
    store._history.ends.pop()
    store.append(6, {**row(6.0), "statistics/new": ((), 2.0)})
    store.close()
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(7))
        assert run.statistics["new"].values[5:].tolist() == [1, 2]


def test_a_writer_that_dies_between_columns_and_log_loses_nothing(one_step, tmp_path, monkeypatch):
    store = written(tmp_path / "a", one_step)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_start_log", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
        store._compact()
    store.close()
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(5))
    # The next writer removes the file that no log names.
    written(tmp_path / "a", one_step, [5], resume=True).close()
    assert not list((tmp_path / "a" / "columns").iterdir())
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(6))


def test_states_are_bounded_and_each_is_a_run(one_step, tmp_path):
    store = written(tmp_path / "a", one_step, keep_states=2)
    for _ in range(3):
        store.save_state(one_step)
    states = sorted((tmp_path / "a" / "states").iterdir())
    assert [state.name for state in states] == ["000002.zarr.zip", "000003.zarr.zip", "000004.zarr.zip"]
    with schema.open_run(states[0]) as run:
        assert run.statistics.sizes["step"] == 1
    store.close()
