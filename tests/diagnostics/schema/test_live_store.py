"""A live store: what was written is read, whatever happened to the writer, and nothing that was not."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from depthscope.diagnostics import analyze, schema
from depthscope.diagnostics.schema import LiveRows
from depthscope.diagnostics.schema.live_rows import packed
from depthscope.diagnostics.schema.live_store import LiveStore
from tests.diagnostics.schema.live_logs import frames, row, written
from tests.diagnostics.small_disks import small_disk

DOORS = (schema.open_run, LiveRows, lambda path: LiveStore(path, resume=True))
SMALL = {"layers": 2, "samples": 2, "tokens": 4, "features": 8}
ROOT = Path(__file__).parents[3]


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


def test_a_growing_a_killed_and_a_finished_store_are_known_from_one_another(one_step, tmp_path, monkeypatch):
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
    with monkeypatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: "elsewhere")
        with schema.open_run(tmp_path / "a") as run:
            assert status_of(run)["state"] == "unknown"
    store = written(tmp_path / "a", one_step, [5], resume=True)
    store.finish()
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(6))
        assert status_of(run)["state"] == "finished"
        assert run.attrs[schema.RESUMED_AT] == [5]
        # A copy is a run like any other.
        copy = schema.save_run(run, tmp_path / "a.zarr")
    with schema.open_run(copy) as run:
        require_rows(run, range(6))
        assert schema.LIVE not in run.attrs


def test_a_store_without_a_finished_step_is_refused_and_can_be_removed(one_step, tmp_path):
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
    schema.save_run(one_step, tmp_path / "runs" / "b.zarr")
    (tmp_path / "runs" / "c").mkdir()
    (tmp_path / "runs" / "c" / schema.LOG).write_text("of another program")
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
    for numbers, message in (
        ({**row(7.0), "metrics/mine": np.zeros(4)}, r"metrics/mine has the shape \(4,\), expected \(3,\)"),
        ({"metrics/other": np.zeros(4)}, "metrics/other is new and has no dims"),
        ({"elsewhere/x": ((), 1.0)}, "'elsewhere/x' is not a name"),
        ({"metrics/other": ("depth", np.zeros(4))}, "conflicting sizes for dimension 'depth'"),
    ):
        with pytest.raises(ValueError, match=message):
            store.append(7, numbers)
    store.close()
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(7))
        mine = run.metrics.mine
        assert mine.dtype == np.float32
        assert mine.attrs == {"units": "1"}
        np.testing.assert_array_equal(mine.values[5], [0, 1, 2])
        assert np.isnan(mine.values[[0, 4, 6]]).all()
        assert run.metrics.site.values.tolist() == ["a", "b", "c"]


def test_a_resumed_training_has_no_step_twice(one_step, tmp_path):
    store = written(tmp_path / "a", one_step, range(11))
    store.note([{"step": 5, "verdict": "rank_collapse"}, {"step": 6, "verdict": "exploding_state"}])
    store.close()
    # An attempt that measures nothing supersedes nothing.
    written(tmp_path / "a", one_step, [], resume=True).close()
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(11))
    # Steps 6 to 10 were of weights that are gone.
    written(tmp_path / "a", one_step, [6, 7, 8, 9], resume=True).close()
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(10))
        assert run.attrs[schema.FINDINGS] == [{"step": 5, "verdict": "rank_collapse"}]
    written(tmp_path / "a", one_step, [0, 1, 2, 3, 4, 5], resume=True).finish()
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(6))
        assert run.attrs[schema.RESUMED_AT] == [6, 0]
        assert schema.FINDINGS not in run.attrs


def test_a_growing_store_is_followed_from_its_last_byte(one_step, tmp_path, monkeypatch):
    store = written(tmp_path / "a", one_step, range(100))
    followed = LiveRows(tmp_path / "a")
    assert followed.column("statistics/token_count").tolist() == list(map(float, range(100)))
    assert not followed.refresh()
    read, whole = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *each: read.append(each[1]) or whole(*each))
    store.append(100, row(100.0))
    assert followed.refresh()
    assert followed.column("statistics/token_count")[-1] == 100.0
    assert sum(read) < 1000
    # Rows from step 6 on are superseded by others.
    for step in range(6, 9):
        store.append(step, row(step + 0.5))
        followed.refresh()
    assert followed.steps.tolist() == list(range(9))
    assert followed.column("statistics/norm_sum")[:, 1, 0].tolist() == [0, 1, 2, 3, 4, 5, 6.5, 7.5, 8.5]
    assert followed.column("statistics/token_count")[7] == 7.5
    assert followed.status().state == "growing"
    store.finish()
    assert followed.refresh()
    assert followed.status().state == "finished"
    # Begun anew, and then made anew.
    for _ in range(2):
        store = written(tmp_path / "a", one_step, [3], force=(tmp_path / "a").exists())
        assert followed.refresh()
        assert followed.steps.tolist() == [3]
        store.close()
        shutil.rmtree(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        followed.refresh()


# --- torn, damaged, hostile


def test_a_torn_tail_is_ignored_and_overwritten(one_step, tmp_path):
    written(tmp_path / "a", one_step).close()
    log = tmp_path / "a" / schema.LOG
    whole = log.read_bytes()
    last = frames(whole)[-1][0]
    for size in range(last + 1, len(whole)):
        log.write_bytes(whole[:size])
        rows = LiveRows(tmp_path / "a")
        assert (rows.last_step, rows.torn) == (3, size - last)
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(4))
    followed = LiveRows(tmp_path / "a")
    log.write_bytes(whole)
    assert followed.refresh()
    assert followed.last_step == 4
    log.write_bytes(whole[:-1] + bytes(300))  # what a power cut leaves
    written(tmp_path / "a", one_step, [4, 5], resume=True).close()
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(6))


def test_damage_before_the_end_is_named_by_its_byte(one_step, tmp_path):
    written(tmp_path / "a", one_step).close()
    log = tmp_path / "a" / schema.LOG
    whole = log.read_bytes()
    third = [at for at, head in frames(whole) if "step" in head][2]
    # A wrong number, two wrong lengths, a wrong head, a wrong beginning.
    for place in (third + 70, third + 4, third + 8, third + 20, third):
        damaged = bytearray(whole)
        damaged[place] ^= 0x41
        log.write_bytes(damaged)
        for door in DOORS:
            with pytest.raises(schema.SchemaError, match=rf"damaged at byte {third}, in row 2"):
                door(tmp_path / "a")
    # As the message says: the rows before it are kept.
    log.write_bytes(damaged[:third])
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(2))


def test_no_flipped_bit_and_no_cut_gives_another_number(one_step, tmp_path):
    written(tmp_path / "a", one_step).close()
    log = tmp_path / "a" / schema.LOG
    whole = log.read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        log.write_bytes(damaged[: draw.choice([len(whole), draw.randrange(1, len(whole))])])
        with suppress(schema.SchemaError):
            rows = LiveRows(tmp_path / "a")
            assert rows.steps.tolist() == list(range(len(rows.rows)))
            if len(rows.rows):
                assert rows.column("statistics/token_count").tolist() == list(
                    map(float, range(len(rows.rows)))
                )


def variable(name: str = "x", **changes) -> dict:
    fields = {"dims": ["depth"], "shape": [3], "dtype": "<f8", "attrs": {}} | changes
    return {"variables": {f"statistics/{name}": fields}, "coords": {}}


BEGUN = {"format": "depthscope live run", "version": 4, "run": "", "created": ""}
NOTHING = {"variables": {}, "coords": {}}


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"begun": BEGUN | {"version": 5}}, "version 5, this depthscope reads 4"),
        ({"begun": BEGUN | {"format": "another"}}, "has the version 4"),
        ({"unheard": "of"}, r"the unknown \['unheard'\]"),
        ([1], "is none that depthscope writes"),
        (variable(dims=["q"], shape=[1 << 36]), "a row of more than"),
        (variable(shape=[-1]), "whole numbers"),
        (variable(dims=["step"]), "has the dims"),
        (variable(dtype="O"), "the dtype 'O'"),
        ({"variables": {"/etc/x": variable()["variables"]["statistics/x"]}}, "is not a name"),
        (variable(shape=[4]), "conflicting sizes"),
        (NOTHING | {"coords": {"metrics/x": {"dims": ["x"], "values": [{}], "attrs": {}}}}, "kinds"),
        (variable(name="token_count"), "is declared twice"),
        ({"step": 9, "time": 0.0}, "no whole variables"),
        ({"finished": True}, "3 bytes of no row"),
        (variable(dims=["x"], shape=[25 << 20]), r"need .* bytes, more than"),  # declared, and in no row
    ],
)
def test_frames_that_no_writer_writes_are_refused(one_step, tmp_path, head, message):
    written(tmp_path / "a", one_step).close()
    with (tmp_path / "a" / schema.LOG).open("ab") as log:
        log.write(packed(head, b"odd" if {"step", "finished"} & {*head} else b""))
    for door in DOORS:
        with pytest.raises(schema.SchemaError, match=message):
            door(tmp_path / "a")


def test_links_pipes_and_holes_are_refused(one_step, tmp_path):
    written(tmp_path / "a", one_step).close()
    log, outside = tmp_path / "a" / schema.LOG, tmp_path / "outside"
    shutil.move(log, outside)
    log.symlink_to(outside)
    assert not schema.is_live_store(tmp_path / "a")
    for door in DOORS[1:]:
        with pytest.raises(OSError, match=r"symbolic link|files in it"):
            door(tmp_path / "a")
    log.unlink()
    os.mkfifo(log)
    assert not schema.is_live_store(tmp_path / "a")
    log.unlink()
    shutil.move(outside, log)
    state = tmp_path / "a" / "states" / "000001.zarr.zip"
    shutil.move(state, outside)
    state.symlink_to(outside)
    with pytest.raises(schema.SchemaError, match="no step was finished"):  # a link is no state
        schema.open_run(tmp_path / "a")
    with log.open("r+b") as file:
        file.truncate(1 << 34)
    with pytest.raises(schema.SchemaError, match="of which the disk holds"):
        LiveRows(tmp_path / "a")


def test_arrays_of_another_run_are_not_taken_for_this_runs(one_step, tmp_path):
    written(tmp_path / "a", one_step).close()
    written(tmp_path / "b", one_step).close()
    shutil.copy(tmp_path / "a" / "states" / "000001.zarr.zip", tmp_path / "b" / "states" / "000002.zarr.zip")
    with pytest.raises(schema.SchemaError, match="is of another run than its log"):
        schema.open_run(tmp_path / "b")


# --- writers


def test_a_store_that_is_there_stays_without_resume_or_force(one_step, tmp_path):
    written(tmp_path / "a", one_step).close()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"has a run already; go on in it with resume=True"):
        LiveStore(tmp_path / "a")
    LiveStore(tmp_path / "a", force=True).close()
    with pytest.raises(schema.SchemaError, match="no step was finished"):
        schema.open_run(tmp_path / "a")
    LiveStore(tmp_path / "a", resume=True).remove()
    assert os.listdir(tmp_path / "a") == ["notes.txt"]
    for options in ({}, {"resume": True}, {"force": True}):
        with pytest.raises(FileExistsError, match="has files in it that are no live run"):
            LiveStore(tmp_path / "a", **options)
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


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_between_writing_and_counting_loses_no_row(one_step, tmp_path, monkeypatch):
    store = written(tmp_path / "a", one_step)
    # Ctrl-C right after the write: neither the bytes nor the new variable are known to the writer.
    with monkeypatch.context() as patch:
        patch.setattr(LiveRows, "take", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.append(5, {**row(5.0), "statistics/new": (("q",), np.zeros(100))})
    store.append(5, {**row(5.0), "statistics/new": ((), 2.0)})
    store.close()
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(6))
        assert run.statistics["new"].values[5] == 2


def test_states_are_bounded_and_each_is_a_run(one_step, tmp_path):
    store = written(tmp_path / "a", one_step, keep_states=2)
    for _ in range(3):
        store.save_state(one_step)
    states = sorted((tmp_path / "a" / "states").iterdir())
    assert [state.name for state in states] == ["000002.zarr.zip", "000003.zarr.zip", "000004.zarr.zip"]
    with schema.open_run(states[0]) as run:
        assert run.statistics.sizes["step"] == 1
    store.close()


# --- real faults


WRITER = """
import sys
from depthscope.diagnostics.schema.live_store import LiveStore
from tests.diagnostics.schema.live_logs import row
store = LiveStore(sys.argv[1], resume=True)
first = 0 if store.last_step is None else store.last_step + 1
for step in range(first, first + 10**7):
    store.append(step, row(float(step)))
    sys.stdout.write(f"{step}\\n")
    sys.stdout.flush()
"""


@pytest.mark.skipif(os.name != "posix", reason="a process is killed")
def test_every_row_that_was_acknowledged_outlives_a_killed_writer(one_step, tmp_path):
    written(tmp_path / "a", one_step, []).close()
    draw = random.Random(0)
    for number in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path / "a"], stdout=subprocess.PIPE, cwd=ROOT
        ) as writer:
            first = writer.stdout.readline()
            end = time.monotonic() + draw.uniform(0.05, 0.3)
            while time.monotonic() < end:  # a copy of a folder that is growing opens as it is
                shutil.copytree(tmp_path / "a", tmp_path / f"copy{number}", dirs_exist_ok=True)
            writer.send_signal(signal.SIGKILL)
            told = int([first, *writer.stdout.read().split(b"\n")[:-1]][-1])
        for folder in ("a", f"copy{number}"):
            with schema.open_run(tmp_path / folder) as run:
                steps = run.statistics.step.values
                require_rows(run, range(len(steps)))
        with schema.open_run(tmp_path / "a") as run:
            assert run.statistics.step.values[-1] >= told


FULL = """
import os, sys
from depthscope.diagnostics.schema.live_store import LiveStore
from tests.diagnostics.schema.live_logs import row
store, failed = LiveStore(sys.argv[1], resume=True), 0
for step in range(2000):
    try:
        store.append(step, row(float(step)))
    except OSError:
        failed += 1
        if failed == 3:  # room again
            os.remove(sys.argv[2])
    except BaseException:
        raise SystemExit(9)
store.close()
print(failed)
"""


def test_a_full_disk_costs_the_rows_for_which_there_is_no_room_and_no_other(one_step, tmp_path):
    with small_disk(tmp_path, 1 << 19) as disk:
        written(disk / "a", one_step, []).close()
        used = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(max(0, (used.f_bavail - 8) * used.f_frsize)))
        words = [sys.executable, "-c", FULL, disk / "a", disk / "filler"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert int(done.stdout) >= 3, done.stderr
        with schema.open_run(disk / "a") as run:
            steps = run.statistics.step.values
            require_rows(run, steps)
            assert len(steps) == 2000 - int(done.stdout)
            assert steps[-1] == 1999


@pytest.mark.skipif(os.name != "posix", reason="there is no limit")
def test_a_limit_on_the_size_of_files_is_an_error_and_the_rows_before_it_stay(one_step, tmp_path):
    written(tmp_path / "a", one_step).close()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = (tmp_path / "a" / schema.LOG).stat().st_size
        store = LiveStore(tmp_path / "a", resume=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 500, resource.RLIM_INFINITY))
        failed = 0
        for step in range(5, 20):
            try:
                store.append(step, row(float(step)))
            except OSError:
                failed += 1
        os._exit(failed)
    failed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert 5 < failed < 15
    with schema.open_run(tmp_path / "a") as run:
        require_rows(run, range(20 - failed))
