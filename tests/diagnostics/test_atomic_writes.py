"""A file or folder that is replaced is whole at every instant, and nothing of others is lost, whenever the writer dies."""

from __future__ import annotations

import contextlib
import errno
import itertools
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
from depthscope.diagnostics.atomic_writes import replaced_file, replaced_folder

posix = pytest.mark.skipif(os.name != "posix", reason="a process is forked and killed")
ROOT = Path(__file__).parents[2]


def write_file(target: Path, text: str) -> None:
    with replaced_file(target) as fresh:
        fresh.write_text(text)


def notes(folder: Path) -> list[Path]:
    """What a user put into the folder."""
    return [name for name in atomic_writes.entries_below(folder) if name.name.startswith("mine")]


def write_folder(target: Path, text: str) -> None:
    with replaced_folder(target, others=notes) as fresh:
        (fresh / "data").mkdir()
        for name in ("one", "data/two"):
            (fresh / name).write_text(text)


def content(target: Path) -> dict[str, str]:
    paths = [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
    return {path.relative_to(target).as_posix(): path.read_text() for path in paths}


# --- every step


STEPS = (
    (os, "replace"), (os, "rename"), (os, "link"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"),
    (shutil, "rmtree"), (shutil, "copymode"), (atomic_writes, "exchange"), (atomic_writes, "remove_litter"),
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
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_writer_that_dies_at_any_step_leaves_the_former_or_the_new(
    tmp_path, monkeypatch, write, exchanges, before
):
    if not exchanges:
        monkeypatch.setattr(atomic_writes, "_exchange_call", lambda: None)
    target = tmp_path / "target"
    write(target, "former")
    if target.is_dir():
        (target / "mine.txt").write_text("notes")
    former = content(target)
    for number in itertools.count():
        child = os.fork()
        if not child:
            with pytest.MonkeyPatch.context() as patch:
                stop_at(patch, number, before=before, stop=lambda: os._exit(9))
                write(target, "new")
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not target.exists():
            assert not exchanges, f"missing after step {number}"
            atomic_writes.remove_litter(tmp_path)
        found = content(target)
        expected = {name: text if name == "mine.txt" else "new" for name, text in former.items()}
        assert found in (former, expected), number
        write(target, "former")
        assert content(target) == former
        assert os.listdir(tmp_path) == ["target"], number
        if status == 0:
            break
    assert number > 8  # the steps were counted


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(errno.EIO, "disk error")], ids=["Ctrl-C", "error"]
)
@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("write", [write_file, write_folder])
def test_an_error_at_any_step_leaves_the_former_or_the_new(tmp_path, monkeypatch, write, exchanges, error):
    if not exchanges:
        monkeypatch.setattr(atomic_writes, "_exchange_call", lambda: None)
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


def test_a_block_that_fails_leaves_everything_as_it_was(tmp_path):
    write_folder(tmp_path / "folder", "former")

    def fail():
        with replaced_folder(tmp_path / "folder") as fresh:
            (fresh / "half").write_text("half")
            raise KeyError("a bug of the caller")

    with pytest.raises(KeyError, match="bug"):
        fail()
    assert content(tmp_path / "folder") == {"one": "former", "data/two": "former"}
    assert os.listdir(tmp_path) == ["folder"]


# --- several writers


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_writers_at_the_same_time_all_succeed_and_the_last_one_is_whole(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(atomic_writes, "_exchange_call", lambda: None)
    write_folder(tmp_path / "folder", "first")
    (tmp_path / "folder" / "mine.txt").write_text("notes")
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
    found = content(tmp_path / "folder")
    assert found.pop("mine.txt") == "notes"
    assert len(set(found.values())) == 1
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_living_writer_is_left_alone(tmp_path):
    with replaced_file(tmp_path / "slow") as fresh:
        fresh.write_text("still writing")
        write_file(tmp_path / "quick", "done")
        assert fresh.read_text() == "still writing"
    assert sorted(os.listdir(tmp_path)) == ["quick", "slow"]


def test_only_scratch_folders_of_ours_are_litter(tmp_path):
    (tmp_path / ".depthscope-notes").write_text("a file of the user")
    (tmp_path / ".elsewhere").mkdir()
    (tmp_path / ".elsewhere" / "new").write_text("mine")
    (tmp_path / ".depthscope-link").symlink_to(".elsewhere")
    (tmp_path / ".depthscope-dead").mkdir()
    write_file(tmp_path / "file", "done")
    assert sorted(os.listdir(tmp_path)) == [".depthscope-link", ".depthscope-notes", ".elsewhere", "file"]
    assert (tmp_path / ".elsewhere" / "new").read_text() == "mine"


# --- files of others


def test_files_of_others_go_along_with_their_inode_mode_and_kind(tmp_path):
    target = tmp_path / "folder"
    write_folder(target, "former")
    (target / "private").mkdir(mode=0o700)
    (target / "private" / "mine.txt").write_text("notes")
    (target / "mine empty").mkdir()
    (target / "mine.link").symlink_to("/nowhere")
    (target / "mine.txt").write_text("edited in place while the new folder is written")
    os.chmod(target / "mine.txt", 0o640)
    inode = (target / "mine.txt").stat().st_ino
    with replaced_folder(target, others=notes) as fresh:
        (fresh / "one").write_text("new")
        (target / "mine.late").write_text("came while it was written")
    assert (target / "mine.txt").stat().st_ino == inode
    assert (target / "mine.txt").stat().st_mode & 0o777 == 0o640
    assert (target / "private").stat().st_mode & 0o777 == 0o700
    assert (target / "mine empty").is_dir()
    assert os.readlink(target / "mine.link") == "/nowhere"
    assert (target / "mine.late").read_text() == "came while it was written"
    assert not (target / "data").exists()


def test_what_appears_at_the_last_instant_is_moved_over(tmp_path, monkeypatch):
    target = tmp_path / "folder"
    write_folder(target, "former")
    (target / "mine.txt").write_text("old notes")
    exchange = atomic_writes.exchange

    def late(one, other):
        (target / "mine.late").write_text("late")
        (tmp_path / "editor").write_text("new notes")
        os.replace(tmp_path / "editor", target / "mine.txt")  # as an editor saves
        return exchange(one, other)

    monkeypatch.setattr(atomic_writes, "exchange", late)
    write_folder(target, "new")
    assert content(target) == {
        "one": "new", "data/two": "new", "mine.late": "late", "mine.txt": "new notes",
    }  # fmt: skip


def test_a_folder_that_must_stay_is_put_back_after_the_exchange(tmp_path, monkeypatch):
    target = tmp_path / "folder"
    write_folder(target, "former")
    exchange = atomic_writes.exchange

    def refuse(folder):
        if (folder / "precious").exists():
            raise ValueError("precious")
        return ()

    def late(one, other):
        (target / "precious").touch()
        monkeypatch.setattr(atomic_writes, "exchange", exchange)
        return exchange(one, other)

    monkeypatch.setattr(atomic_writes, "exchange", late)

    def write():
        with replaced_folder(target, others=refuse) as fresh:
            (fresh / "one").write_text("new")

    with pytest.raises(ValueError, match="precious"):
        write()
    assert content(target) == {"one": "former", "data/two": "former", "precious": ""}
    assert os.listdir(tmp_path) == ["folder"]


def test_without_hard_links_files_of_others_are_copied(tmp_path, monkeypatch):
    def no_links(*_, **__):
        raise OSError(errno.EPERM, "no hard links here")

    target = tmp_path / "folder"
    write_folder(target, "former")
    (target / "mine.txt").write_text("notes")
    (target / "mine.link").symlink_to("one")
    monkeypatch.setattr(os, "link", no_links)
    write_folder(target, "new")
    assert (target / "mine.txt").read_text() == "notes"
    assert os.readlink(target / "mine.link") == "one"


def test_a_fresh_file_never_takes_the_name_of_a_foreign_one(tmp_path):
    target = tmp_path / "folder"
    write_folder(target, "former")
    (target / "mine.txt").write_text("notes")

    def write():
        with replaced_folder(target, others=notes) as fresh:
            (fresh / "mine.txt").write_text("ours")

    with pytest.raises(ValueError, match="in the way"):
        write()
    assert (target / "mine.txt").read_text() == "notes"


# --- targets that cannot be written


def test_what_a_link_points_to_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    write_file(tmp_path / "disk" / "real", "former")
    (tmp_path / "name").symlink_to("disk/real")
    write_file(tmp_path / "name", "new")
    assert (tmp_path / "name").is_symlink()
    assert (tmp_path / "disk" / "real").read_text() == "new"
    (tmp_path / "later").symlink_to("disk/not yet there")
    write_file(tmp_path / "later", "new")
    assert (tmp_path / "disk" / "not yet there").read_text() == "new"
    assert sorted(os.listdir(tmp_path / "disk")) == ["not yet there", "real"]


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
            write_folder(target, "new") if kind == "circle" else replaced_folder(target).__enter__()


def test_a_parent_that_is_a_file_and_a_missing_one(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file, but"):
        write_file(tmp_path / "file" / "deeper" / "target", "new")
    write_file(tmp_path / "made" / "on the way" / "target", "new")
    assert (tmp_path / "made" / "on the way" / "target").read_text() == "new"


def test_a_private_file_stays_private_and_a_protected_one_is_refused(tmp_path, monkeypatch):
    write_file(tmp_path / "file", "former")
    os.chmod(tmp_path / "file", 0o600)
    write_file(tmp_path / "file", "new")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    # root may write everywhere, so that the answer of the system is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("file"))
    with pytest.raises(PermissionError, match=r"write-protected; allow it with: chmod u\+w"):
        write_file(tmp_path / "file", "newer")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="no permission to write in"):
        write_file(tmp_path / "other", "new")
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
    schema.save_run(run, sys.argv[1])
    print("written", flush=True)
"""


@posix
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_whose_writer_is_killed_is_the_former_or_the_new(tmp_path, make_run, number):
    """Whatever else is written goes through the same two functions: the commands' own files, a bundle, a cache."""
    runs = [make_run(family, layers=1, tokens=8, features=8) for family in ("residual", "hc")]
    target = tmp_path / "run.zarr"
    with subprocess.Popen([sys.executable, "-c", WRITER, target], stdout=subprocess.PIPE, cwd=ROOT) as writer:
        assert writer.stdout.readline() == b"written\n"
        time.sleep(random.Random(int(number)).uniform(0, 0.3))
        writer.send_signal(number)
    with schema.open_run(target) as found:
        trace = found["trace"].to_dataset().load()
    assert any(trace.identical(run["trace"].to_dataset()) for run in runs)
    schema.save_run(runs[0], target)
    assert os.listdir(tmp_path) == ["run.zarr"]


def test_where_there_is_no_room_for_a_lock_nothing_is_left(tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("filelock.FileLock.acquire", full)
    with pytest.raises(OSError, match="No space left"), replaced_file(tmp_path / "a"):
        raise AssertionError
    assert not list(tmp_path.iterdir())
