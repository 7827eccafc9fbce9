"""A file or folder that is replaced is complete at every instant, and nothing of others is touched."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from depthscope.diagnostics import atomic_writes, schema
from depthscope.diagnostics.atomic_writes import (
    replaced_file,
    replaced_folder,
    require_writable,
    state_folder,
)

posix = pytest.mark.skipif(os.name != "posix", reason="a process is forked and killed")
ROOT = Path(__file__).parents[2]


def write_file(target: Path, text: str) -> None:
    with replaced_file(target) as fresh:
        fresh.write_text(text)


def refuse_notes(folder: Path) -> None:
    if any(entry.name.startswith("mine") for entry in atomic_writes.entries_below(folder)):
        raise ValueError("notes of the user")


def write_folder(target: Path, text: str) -> None:
    with replaced_folder(target, check=refuse_notes) as fresh:
        (fresh / "data").mkdir()
        for name in ("one", "data/two"):
            (fresh / name).write_text(text)


def content(target: Path) -> dict[str, str]:
    paths = [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
    return {path.relative_to(target).as_posix(): path.read_text() for path in paths}


def records() -> list[Path]:
    folder = state_folder() / "scratch"
    return list(folder.iterdir()) if folder.is_dir() else []


# --- every step


STEPS = (
    (os, "replace"), (os, "open"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"),
    (shutil, "rmtree"), (shutil, "copymode"),
)  # fmt: skip


def stop_at(patch: pytest.MonkeyPatch, number: int, *, before: bool, stop) -> list[str]:
    """Call `stop` at a numbered step of what follows, before the step or when it is done."""
    count = itertools.count()
    stopped: list[str] = []

    def wrapped(owner, name):
        step = getattr(owner, name)

        def call(*args, **kwargs):
            here = not stopped and next(count) == number
            if here:
                stopped.append(name)
            if here and before:
                stop()
            try:
                return step(*args, **kwargs)
            finally:  # a step may raise as a part of its work, such as making a folder that exists
                if here and not before:
                    stop()

        patch.setattr(owner, name, call)

    for owner, name in STEPS:
        wrapped(owner, name)
    return stopped


@posix
@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_writer_that_dies_at_any_step_leaves_the_former_or_the_new(tmp_path, write):
    target = tmp_path / "target"
    write(target, "former")
    former = content(target)
    for number in itertools.count():
        child = os.fork()
        if not child:
            with pytest.MonkeyPatch.context() as patch:
                stop_at(patch, number, before=False, stop=lambda: os._exit(9))
                write(target, "new")
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        write_file(tmp_path / "other", "the next writer in this folder puts back what was moved aside")
        os.remove(tmp_path / "other")
        assert content(target) in (former, dict.fromkeys(former, "new")), number
        write(target, "former")
        left = [name for name in os.listdir(tmp_path) if name != "target"]
        # Killed between making the scratch folder and recording which one it is: empty, and nobody's.
        assert all(not os.listdir(tmp_path / name) for name in left), (number, left)
        for name in left:
            os.rmdir(tmp_path / name)
        if status == 0:
            break
    assert number > 8  # the steps were counted
    assert not records()


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(errno.EIO, "disk error")], ids=["Ctrl-C", "error"]
)
@pytest.mark.parametrize("write", [write_file, write_folder])
def test_an_error_at_any_step_leaves_the_former_or_the_new(tmp_path, monkeypatch, write, error):
    target = tmp_path / "target"
    write(target, "former")
    former = content(target)

    def stop():
        raise error

    for number in itertools.count():
        with pytest.MonkeyPatch.context() as patch:
            stopped = stop_at(patch, number, before=True, stop=stop)
            with contextlib.suppress(KeyboardInterrupt, OSError):
                write(target, "new")
        assert content(target) in (former, dict.fromkeys(former, "new")), (number, stopped)
        write(target, "former")
        assert os.listdir(tmp_path) == ["target"], (number, stopped)
        if not stopped:
            break
    assert number > 8


# --- several writers


def test_writers_at_the_same_time_all_succeed_and_the_last_one_is_complete(tmp_path):
    errors = []

    def write(number: int) -> None:
        try:
            for _ in range(10):
                write_folder(tmp_path / "folder", str(number))
                write_file(tmp_path / "file", str(number))
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert errors == []
    assert len(set(content(tmp_path / "folder").values())) == 1
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_living_writer_is_left_alone(tmp_path):
    with replaced_file(tmp_path / "slow") as fresh:
        fresh.write_text("still writing")
        write_file(tmp_path / "quick", "done")
        assert fresh.read_text() == "still writing"
    assert sorted(os.listdir(tmp_path)) == ["quick", "slow"]


# --- what is not ours


def test_a_scratch_folder_that_is_not_recorded_stays(tmp_path):
    """As in a folder that somebody sends, who knows what ours are called and look like."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    (tmp_path / ".depthscope-link").symlink_to("elsewhere")
    dead = tmp_path / ".depthscope-0123456789abcdef"
    (dead / "new").mkdir(parents=True)
    (dead / "old").symlink_to("../elsewhere")
    (dead / "new" / "mine").write_text("new")
    (dead / "lock").touch()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write_file(tmp_path / "file", "done")
    write_folder(tmp_path / "mine too", "done")
    assert {path: path.read_bytes() for path in before} == before


@posix
def test_a_record_of_another_machine_or_of_another_folder_removes_nothing(tmp_path):
    write_file(tmp_path / "file", "done")
    scratch = tmp_path / ".depthscope-1"
    scratch.mkdir()
    (scratch / "mine").touch()
    status = scratch.lstat()
    good = {
        "folder": str(scratch),
        "target": "x",
        "id": [status.st_dev, status.st_ino],
        "host": os.uname().nodename,
    }
    record = state_folder() / "scratch" / "1"
    for facts in (good | {"host": "another"}, good | {"id": [1, 2]}, [], {}):
        record.write_text(json.dumps(facts))
        write_file(tmp_path / "file", "done")
        assert (scratch / "mine").exists()
        record.unlink(missing_ok=True)
    record.write_text(json.dumps(good))
    write_file(tmp_path / "file", "done")
    assert os.listdir(tmp_path) == ["file"]
    assert not record.exists()


def test_a_folder_with_something_in_it_is_replaced_only_where_its_check_allows_it(tmp_path):
    (tmp_path / "folder").mkdir()
    with replaced_folder(tmp_path / "folder") as fresh:
        (fresh / "one").touch()
    with pytest.raises(FileExistsError, match="has files in it"), replaced_folder(tmp_path / "folder"):
        pass
    with pytest.raises(ValueError, match="notes"), replaced_folder(tmp_path / "folder", check=refuse_notes):
        (tmp_path / "folder" / "mine").touch()  # while the new one is written
    assert sorted(os.listdir(tmp_path / "folder")) == ["mine", "one"]
    assert os.listdir(tmp_path) == ["folder"]


def test_what_appears_at_the_last_instant_puts_the_folder_back(tmp_path, monkeypatch):
    write_folder(tmp_path / "folder", "former")
    replace = os.replace

    def late(source, goal, **options):
        if Path(source).name == "folder" and "new" not in Path(source).parts:
            (tmp_path / "folder" / "mine").touch()
            monkeypatch.setattr(os, "replace", replace)
        return replace(source, goal, **options)

    monkeypatch.setattr(os, "replace", late)
    with pytest.raises(ValueError, match="notes"):
        write_folder(tmp_path / "folder", "new")
    assert content(tmp_path / "folder") == {"one": "former", "data/two": "former", "mine": ""}
    assert os.listdir(tmp_path) == ["folder"]


# --- targets that cannot be written


@posix
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "circle"])
def test_what_is_no_file_is_refused_in_a_sentence(tmp_path, kind):
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
    elif kind == "pipe":
        os.mkfifo(target)
    elif kind == "device":
        target.symlink_to("/dev/null")
    else:
        target.symlink_to("target")
    before = target.lstat()
    with pytest.raises(OSError, match=f"is a .*{kind}"):
        write_file(target, "new")
    assert target.lstat() == before
    assert os.listdir(tmp_path) == ["target"]
    if kind != "folder":
        with pytest.raises(OSError, match=f"is a .*{kind}"):
            write_folder(target, "new")


def test_a_parent_that_is_a_file_and_a_missing_one(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file, but"):
        write_file(tmp_path / "file" / "deeper" / "target", "new")
    write_file(tmp_path / "made" / "on the way" / "target", "new")
    assert (tmp_path / "made" / "on the way" / "target").read_text() == "new"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
def test_where_nothing_can_be_written_is_found_out_with_a_file_and_not_by_permissions():
    for place in ("/proc/nowhere/x", "/proc/nowhere", "/sys/x"):
        with pytest.raises(PermissionError, match="nothing can be written in"):
            require_writable(place)


def test_a_private_file_stays_private_and_a_protected_one_is_refused(tmp_path, monkeypatch):
    write_file(tmp_path / "file", "former")
    os.chmod(tmp_path / "file", 0o600)
    write_file(tmp_path / "file", "new")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    # root may write everywhere, so that the answer of the system is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("file"))
    with pytest.raises(PermissionError, match=r"write-protected; allow it with: chmod u\+w"):
        write_file(tmp_path / "file", "newer")
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_target_and_changes_nothing(tmp_path, number):
    write_file(tmp_path / "file", "former")

    def write():
        with replaced_file(tmp_path / "file") as fresh:
            fresh.write_text("half")
            raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match="what was there before is unchanged") as caught:
        write()
    assert caught.value.filename == str(tmp_path / "file")
    assert content(tmp_path / "file") == {".": "former"}
    assert os.listdir(tmp_path) == ["file"]


def test_without_a_state_folder_everything_is_written_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "state").write_text("a file is in its place")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    write_folder(tmp_path / "folder", "new")
    assert sorted(os.listdir(tmp_path)) == ["folder", "state"]


def test_a_name_as_long_as_the_file_system_allows(tmp_path):
    name = "n" * 255
    write_file(tmp_path / name, "new")
    write_folder(tmp_path / name[1:], "new")
    assert len(os.listdir(tmp_path)) == 2


# --- killed at random moments


WRITER = """
import sys
from itertools import cycle
from depthscope.diagnostics import schema
from tests.models.synthetic_run import synthetic_run
runs = [synthetic_run(family, layers=1, tokens=8, features=8) for family in ("residual", "hc")]
for run in cycle(runs):
    schema.save_run(run, sys.argv[1], force=True)
    print("written", flush=True)
"""


@posix
@pytest.mark.parametrize("suffix", schema.SUFFIXES)
def test_a_run_whose_writer_is_killed_is_the_former_or_the_new(tmp_path, make_run, suffix):
    runs = [make_run(family, layers=1, tokens=8, features=8) for family in ("residual", "hc")]
    target = tmp_path / f"run{suffix}"
    with subprocess.Popen([sys.executable, "-c", WRITER, target], stdout=subprocess.PIPE, cwd=ROOT) as writer:
        assert writer.stdout.readline() == b"written\n"
        time.sleep(random.Random(suffix).uniform(0, 0.3))
        writer.send_signal(signal.SIGKILL)
    write_file(tmp_path / "other", "the next writer")
    with schema.open_run(target) as found:
        trace = found["trace"].to_dataset().load()
    assert any(trace.identical(run["trace"].to_dataset()) for run in runs)
    schema.save_run(runs[0], target, force=True)
    assert sorted(os.listdir(tmp_path)) == ["other", target.name]
