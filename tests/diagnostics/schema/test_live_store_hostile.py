"""A live store that is not what was written: links, files of another run, frames out of place, forged notes, sizes."""

from __future__ import annotations

import copy
import json
import shutil
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from depthscope.app.cli.main import main
from depthscope.diagnostics import schema
from depthscope.diagnostics.schema import FollowedStore, SchemaError, live_store, live_store_reading
from depthscope.diagnostics.schema.live_store import LiveStore
from depthscope.diagnostics.schema.live_store_frames import BEGIN, NOTE, ROW
from depthscope.diagnostics.schema.live_store_history import read_history
from depthscope.diagnostics.schema.live_store_rows import ROW_HEAD
from tests.damage import ODD, places
from tests.diagnostics.schema.live_logs import begins, chained, payloads, row, written

READERS = (schema.open_run, FollowedStore)


def resume(path: Path) -> None:
    LiveStore(path, resume=True).close()


@pytest.fixture(scope="module")
def one_step(make_run) -> xr.DataTree:
    run = make_run("residual", layers=2, samples=2, tokens=4, features=8)
    run.attrs["step"] = int(run.statistics.step.values[-1])
    return run


@pytest.fixture(scope="module")
def two_runs(one_step, tmp_path_factory) -> tuple[Path, Path]:
    """Two finished stores with files of columns, which differ in their numbers and nothing else."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_store, "MAX_LOG_ROWS", 4)
        for name, first in (("a", 0), ("b", 100)):
            store = LiveStore(folder / name)
            store.save_state(one_step)
            for step in range(10):
                store.append(step, row(float(first + step)))
            store.finish()
    return folder / "a", folder / "b"


@pytest.fixture
def pair(two_runs, tmp_path) -> tuple[Path, Path]:
    for store in two_runs:
        shutil.copytree(store, tmp_path / store.name)
    return tmp_path / "a", tmp_path / "b"


# --- links


@pytest.mark.parametrize("folder", ["columns", "states"])
def test_a_folder_that_is_a_link_is_neither_read_nor_emptied(pair, tmp_path, folder):
    store, _ = pair
    outside = tmp_path / "outside"
    (store / folder).rename(outside)
    for name in ("000090", "000091", "000092"):  # of somebody else
        for ending in (".cols", ".zarr.zip"):
            (outside / f"{name}{ending}").write_bytes(b"mine")
    before = {entry.name: entry.read_bytes() for entry in outside.iterdir()}
    (store / folder).symlink_to(outside)
    for door in READERS:
        with pytest.raises(SchemaError, match=f"contains {folder}, which is not a part"):
            door(store)
    for options in ({"resume": True}, {"force": True}):
        with pytest.raises(FileExistsError, match=f"contains {folder}, which is not a part"):
            LiveStore(store, **options)
    assert {entry.name: entry.read_bytes() for entry in outside.iterdir()} == before


def test_a_folder_that_becomes_a_link_is_not_written_through(pair, one_step, tmp_path, monkeypatch):
    monkeypatch.setattr(live_store, "MAX_LOG_ROWS", 4)
    path, other = pair
    run = schema.open_run(path)
    store = LiveStore(path, resume=True)
    for folder in ("columns", "states"):
        shutil.rmtree(path / folder)
        (path / folder).symlink_to(other / folder)
    before = {entry: entry.stat().st_mtime_ns for entry in other.rglob("*")}
    with pytest.raises(FileExistsError, match="states is a link"):
        store.save_state(one_step)
    for step in range(10, 20):
        store.append(step, row(float(step)))  # the rows stay in the log, which is no link
    store.close()
    assert {entry: entry.stat().st_mtime_ns for entry in other.rglob("*")} == before
    # A run that was opened before reads nothing of the other one.
    with pytest.raises((SchemaError, OSError)):
        _ = run.statistics.norm_sum.values
    run.close()


# --- files of another run


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("columns/000001.cols", "not the file that the log of this run names"),
        ("states/000001.zarr.zip", "is of another run than its log"),
        (schema.LOG, "is of another run than its log"),
    ],
)
def test_a_file_of_another_run_is_not_taken_for_this_runs(pair, name, message):
    store, other = pair
    shutil.copyfile(other / name, store / name)
    with pytest.raises(SchemaError, match=message):
        schema.open_run(store)


def test_two_files_of_columns_that_are_exchanged_are_refused(pair):
    store, _ = pair
    one, two, aside = (store / "columns" / name for name in ("000001.cols", "000002.cols", "aside"))
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    for door in (*READERS, resume):
        with pytest.raises(SchemaError, match="not the file that the log of this run names"):
            door(store)


def test_a_store_that_is_copied_onto_an_older_one_is_refused_and_nothing_is_removed(pair, one_step):
    store, newer = pair
    for number in (7, 8, 9):
        shutil.copyfile(store / "columns" / "000001.cols", store / "columns" / f"00000{number}.cols")
        shutil.copyfile(store / "states" / "000001.zarr.zip", store / "states" / f"00000{number}.zarr.zip")
    shutil.copytree(newer, store, dirs_exist_ok=True)  # cp -r b/. a
    before = sorted(store.rglob("*"))
    for door in (*READERS, resume):
        with pytest.raises(SchemaError, match=r"contains columns/000007\.cols, which its log does not name"):
            door(store)
    assert sorted(store.rglob("*")) == before


def test_a_file_that_its_writer_removes_while_the_store_is_opened_is_no_foreign_one(
    pair, one_step, monkeypatch
):
    monkeypatch.setattr(live_store, "MAX_LOG_ROWS", 4)
    path, _ = pair
    read = live_store_reading.read_history

    def read_later(store, **options):
        monkeypatch.setattr(live_store_reading, "read_history", read)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(live_store, "read_history", read)
            writer = LiveStore(path, resume=True)
            for step in range(9):  # supersedes all rows, whose files go
                writer.append(step, row(float(step)))
            writer.close()
        return read(store, **options)

    names = {entry.name for entry in (path / "columns").iterdir()}
    monkeypatch.setattr(live_store_reading, "read_history", read_later)
    with schema.open_run(path) as run:
        np.testing.assert_array_equal(run.statistics.step.values, range(9))
    # And no number is given twice.
    assert not names & {entry.name for entry in (path / "columns").iterdir()}


def test_what_is_left_of_a_store_without_its_log_is_not_begun_in(pair):
    store, _ = pair
    (store / schema.LOG).unlink()
    for options in ({}, {"resume": True}):
        with pytest.raises(FileExistsError, match="of a live run whose log is gone"):
            LiveStore(store, **options)
    LiveStore(store, force=True).close()
    assert {entry.name for entry in store.rglob("*")} <= {schema.LOG, "writer.lock"}


# --- frames


def rearranged(frames: list[bytes]) -> dict[str, list[bytes]]:
    found = {}
    for at in range(1, len(frames)):
        found[f"{at} removed"] = frames[:at] + frames[at + 1 :]
        found[f"{at} doubled"] = frames[: at + 1] + frames[at:]
        found[f"{at} replayed"] = [*frames, frames[at]]
        if at > 1:
            found[f"{at} swapped"] = [*frames[: at - 1], frames[at], frames[at - 1], *frames[at + 1 :]]
    return found


def test_frames_that_are_removed_doubled_swapped_or_replayed_are_noticed(two_runs, tmp_path, one_step):
    store = written(tmp_path / "c", one_step, range(4))
    store.append(4, {**row(4.0), "metrics/late": ((), 1.0)})
    store.note({"model": "x"})
    store.finish()
    log = tmp_path / "c" / schema.LOG
    whole = log.read_bytes()
    places = [*begins(whole), len(whole)]
    frames = [whole[begin:end] for begin, end in pairwise(places)]
    cases = rearranged(frames)
    cases["of another run"] = [*frames, (two_runs[0] / schema.LOG).read_bytes()[-80:]]
    for name, case in cases.items():
        log.write_bytes(b"".join(case))
        if name == f"{len(frames) - 1} removed":
            continue  # a log without its end is that of a writer that was killed there
        for door in (FollowedStore, resume):
            with pytest.raises(SchemaError, match="damaged at byte"):
                door(tmp_path / "c")
    log.write_bytes(b"".join(frames[:-1]))
    with schema.open_run(tmp_path / "c") as run:
        assert run.attrs[schema.LIVE]["state"] == "killed"


# --- forged notes, declarations and coordinates, with their checksums


def replaced(content: object, path: tuple, value: object) -> object:
    if not path:
        return value
    changed = copy.copy(content)
    changed[path[0]] = replaced(content[path[0]], path[1:], value)
    return changed


def forged_logs(log: bytes):
    """Each place in each JSON of a log with each of the values, or without what is there."""
    frames = payloads(log)
    for number, (kind, payload) in enumerate(frames):
        if kind == ROW:
            continue
        content = json.loads(payload)
        for path in places(content):
            for value in ODD:
                forged = json.dumps(replaced(content, path, value)).encode()
                yield (
                    f"{number} {path} {value!r}",
                    chained([*frames[:number], (kind, forged), *frames[number + 1 :]]),
                )


@pytest.fixture(scope="module")
def small(tmp_path_factory, one_step) -> Path:
    path = tmp_path_factory.mktemp("forged") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_store, "MAX_LOG_ROWS", 4)
        store = written(path, one_step, range(6))
    labels = {
        "metrics/depth": ("depth", [0, 1, 2]),
        "metrics/site": ("depth", ["a", "b", "c"], {"units": "1"}),
    }
    store.append(
        6,
        {**row(6.0), "metrics/residual_norm": (("depth", "stream"), np.ones((3, 1)), {"units": "1"})},
        coords=labels,
    )
    store.note({"evaluations_left_out": 3, "model": "x"})
    store.note({"complete": True}, "metrics")
    store.close()
    store = LiveStore(path, resume=True)
    store.append(6, row(6.0))
    store.finish()
    return path


def test_every_forged_statement_is_refused_in_a_sentence_or_read(small, tmp_path):
    """Rows that are read are those that were written, whatever else is said."""
    store = tmp_path / "a"
    shutil.copytree(small, store)
    log = store / schema.LOG
    read = refused = 0
    for name, forged in forged_logs(log.read_bytes()):
        log.write_bytes(forged)
        try:
            followed = FollowedStore(store)
            history = read_history(store)
            assert np.array_equal(followed.steps, history.steps()), name
            assert followed.status().sentence.encode(), name
            for variable in history.variables:
                assert len(followed.column(variable)) == history.num_rows, name
            read += 1
        except SchemaError:
            refused += 1
    assert read > 100
    assert refused > 1000


def test_forged_statements_are_answered_by_the_commands(small, tmp_path, capsys):
    store = tmp_path / "a"
    shutil.copytree(small, store)
    log = store / schema.LOG
    codes = set()
    logs = list(forged_logs(log.read_bytes()))
    # And a metric along other dims: its statements fit to each other, and not to what verdicts expect of it.
    dims = [each for each in logs if "'metrics/residual_norm', 'dims', " in each[0]]
    assert dims
    for name, forged in [*logs[::601], *dims]:
        log.write_bytes(forged)
        code = main(["check", str(store)])
        printed = capsys.readouterr()
        assert code in (0, 1, 2), f"{name}: {code} {printed.err}"
        assert "Traceback" not in printed.err, name
        codes.add(code)
    assert 2 in codes


# --- memory and time

MEGABYTE = 1 << 20


def begun(**fields: object) -> tuple[int, bytes]:
    begin = {"format": "depthscope live run", "version": 2, "run": "0" * 32, "created": "2026-01-01T00:00:00"}
    lists = {name: [] for name in ("columns", "files", "attempts")}
    mappings = {name: {} for name in ("variables", "coords", "attrs")}
    return BEGIN, json.dumps({**begin, **lists, **mappings, "finished": False, **fields}).encode()


def number(shape: list[int]) -> dict[str, object]:
    dims = ["x", "y"][: len(shape)]
    return {"statistics/x": {"dims": dims, "shape": shape, "dtype": "<f4", "attrs": {}}}


def row_frame(step: int, count: int = 0, data: bytes = b"") -> tuple[int, bytes]:
    return ROW, ROW_HEAD.pack(step, 1.0, count) + data


LISTS = b'{"note": "attributes", "attrs": {"": {"%d": [%s[]]}}}'
FLOODS = {
    "rows without numbers": lambda n: [begun(), *(row_frame(step) for step in range(n // 40))],
    "rows": lambda n: [
        begun(variables=number([])),
        *(row_frame(step, 1, bytes(4)) for step in range(n // 44)),
    ],
    "one row that comes again": lambda n: [
        begun(variables=number([])),
        *[row_frame(0, 1, bytes(4))] * (n // 44),
    ],
    "attempts": lambda n: [
        begun(),
        *[(NOTE, b'{"note": "opened", "time": 0, "pid": 0, "host": ""}')] * (n // 75),
    ],
    "lists": lambda n: [
        begun(),
        *((NOTE, LISTS % (at, b"[]," * (n // 4))) for at in range(4)),
    ],
    "escaped texts": lambda n: [begun(attrs={"": {"a": ["\0"] * 400_000}})],
    "labels of unlike lengths": lambda n: [
        begun(
            coords={"metrics/x": {"dims": ["x"], "values": ["x" * MEGABYTE] + ["a"] * 500_000, "attrs": {}}}
        )
    ],
    "rows without a large variable": lambda n: [
        begun(variables=number([MEGABYTE])),
        *(row_frame(step) for step in range(550)),
    ],
    "a variable that nobody has room for": lambda n: [begun(variables=number([1 << 40])), row_frame(0)],
}


@pytest.mark.parametrize("flood", FLOODS)
def test_no_log_takes_more_memory_than_its_bytes_account_for(flood, tmp_path):
    """8 times the bytes, and 256 MiB for declarations and notes, for whoever looks at it."""
    content = chained(FLOODS[flood](MEGABYTE))
    free = (
        256 * MEGABYTE if flood in ("lists", "escaped texts", "rows without a large variable") else MEGABYTE
    )
    (tmp_path / schema.LOG).write_bytes(content)
    for door in (FollowedStore, read_history):
        tracemalloc.start()
        try:
            opened = door(tmp_path)
            if isinstance(opened, FollowedStore) and len(opened.steps):
                for name in opened.variables:
                    opened.column(name)
                    opened.row(len(opened.steps) - 1)
            del opened
        except SchemaError:
            pass
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < free + 8 * len(content)


def test_a_hole_in_a_file_is_refused(pair):
    store, _ = pair
    with (store / schema.LOG).open("r+b") as log:
        log.truncate(1 << 29)
    for door in READERS:
        with pytest.raises(SchemaError, match="of which the disk holds"):
            door(store)


def test_a_log_with_numbers_that_a_second_process_added_names_the_depthscope_that_reads_it(tmp_path):
    later = (5, bytes(20))  # as version 0.2 before its release wrote with analysis="process"
    (tmp_path / schema.LOG).write_bytes(
        chained([begun(variables=number([])), row_frame(0, 1, bytes(4)), later])
    )
    for door in (FollowedStore, read_history):
        with pytest.raises(SchemaError, match="save it as a file with that depthscope"):
            door(tmp_path)
