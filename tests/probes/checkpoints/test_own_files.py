"""Files of a checkpoint: its own regular ones are read; links to outside, pipes and devices are refused unopened."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.checkpoints.own_files import (
    JSON_LIMIT,
    check_folder,
    own_file,
    read_json,
    require_file,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "m" / "sub").mkdir(parents=True)
    (tmp_path / "outside.bin").write_text("not the checkpoint's")
    (tmp_path / "m" / "own.bin").touch()
    (tmp_path / "m" / "sub" / "own.bin").touch()
    return tmp_path / "m"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    # by a relative name, since the whole path may be longer than a socket's name can be
    here = Path.cwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


SPECIAL = [(pipe, "a named pipe"), (device, "a device"), (listening, "a socket"), (Path.mkdir, "a folder")]


@pytest.mark.parametrize(("make", "kind"), SPECIAL)
def test_only_regular_files_are_opened(make, kind, tmp_path):
    make(tmp_path / "x")
    with pytest.raises(CheckpointError, match=f"x' is {kind}; expected a regular file"):
        require_file(tmp_path / "x")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.bin",
        "sub/../../outside.bin",
        "/etc/hostname",
        "..\\outside.bin",
        "C:\\Windows\\win.ini",
        "C:x",
        "\\\\host\\share\\x",
        "a\0b",
        "",
        None,
        3,
        ["own.bin"],
    ],
)
def test_names_that_lead_elsewhere_are_refused(folder, name):
    with pytest.raises(CheckpointError, match=r"leads out of|expected the name of one in it"):
        own_file(folder, name)


@pytest.mark.parametrize("target", ["../outside.bin", "absolute", "/dev/zero", "."])
def test_links_to_outside_are_refused(folder, target):
    outside = folder.parent / "outside.bin"
    (folder / "link.bin").symlink_to({"absolute": outside, ".": folder.parent}.get(target, target))
    with pytest.raises(CheckpointError, match=r"'link\.bin' leads out of the checkpoint's folder"):
        own_file(folder, "link.bin")
    (folder / "way").symlink_to(folder.parent)
    with pytest.raises(CheckpointError, match="leads out"):
        own_file(folder, "way/outside.bin")


@pytest.fixture
def hub_snapshot(tmp_path) -> Path:
    """A file as the cache of the Hugging Face hub keeps it: a link of the snapshot to a blob of the repository."""
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "f00d").write_text("{}")
    (repository / "refs").write_text("0123abc")
    (snapshot / "config.json").symlink_to("../../blobs/f00d")
    return snapshot


def test_of_the_hub_cache_only_the_blobs_of_the_same_repository(hub_snapshot):
    other = hub_snapshot.parents[2] / "models--org--secret" / "blobs"
    other.mkdir(parents=True)
    (other / "beef").touch()
    (hub_snapshot / "a").symlink_to(other / "beef")
    (hub_snapshot / "b").symlink_to("../../refs")
    for name in "ab":
        with pytest.raises(CheckpointError, match="leads out"):
            own_file(hub_snapshot, name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "holds a list"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    ],
)
def test_json_that_is_none(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "x.json", "index")


def test_json_beyond_the_limit_is_not_read(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(JSON_LIMIT + 1)  # sparse: takes no disk
    with pytest.raises(CheckpointError, match="64 at most"):
        read_json(tmp_path / "x.json", "index")


def test_a_circle_of_links_is_refused(folder):
    (folder / "a.bin").symlink_to("b.bin")
    (folder / "b.bin").symlink_to("a.bin")
    with pytest.raises(CheckpointError, match=r"cannot be (followed|read)"):
        check_folder(folder)
