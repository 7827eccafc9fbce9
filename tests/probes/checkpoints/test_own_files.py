"""Files of a checkpoint: its own regular ones are read; links to outside, pipes and devices are refused unopened."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import depthscope as ds
from depthscope.probes.checkpoints.errors import CheckpointError

INDEX = "model.safetensors.index.json"
LIMIT = 64 << 20  # bytes of a JSON file


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint of one file, next to a file that is none of its own."""
    (tmp_path / "m").mkdir()
    for name in ("outside.bin", "m/own.bin"):
        save_file({"x": torch.zeros(2)}, tmp_path / name)
    return tmp_path / "m"


def describe_with(folder: Path, name: object):
    """What is described where the index names a file."""
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    return ds.describe_weights(folder)


def listening(path: Path) -> None:
    # by a relative name, since the whole path may be longer than a socket's name can be
    here = Path.cwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


SPECIAL = [(os.mkfifo, "a named pipe"), (listening, "a socket"), (Path.mkdir, "a folder")]


@pytest.mark.parametrize(("make", "kind"), SPECIAL)
def test_only_regular_files_are_opened(make, kind, folder):
    assert describe_with(folder, "own.bin").num_tensors == 1
    make(folder / "x")
    with pytest.raises(CheckpointError, match=f"x' is {kind}; expected a regular file"):
        describe_with(folder, "x")


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.bin", "sub/../../outside.bin", "/etc/hostname", "..\\outside.bin"),
        *("C:\\Windows\\win.ini", "C:x", "\\\\host\\share\\x", "a\0b", "", None, 3, ["own.bin"]),
    ],
)
def test_names_that_lead_elsewhere_are_refused(folder, name):
    with pytest.raises(CheckpointError, match=r"lead out of|expected the name of one in it|gives no file"):
        describe_with(folder, name)


@pytest.mark.parametrize("target", ["../outside.bin", "absolute", "/dev/zero", "."])
def test_links_to_outside_are_refused(folder, target):
    outside = folder.parent / "outside.bin"
    (folder / "link.bin").symlink_to({"absolute": outside, ".": folder.parent}.get(target, target))
    with pytest.raises(CheckpointError, match=r"'link\.bin' leads out of"):
        describe_with(folder, "link.bin")


def test_a_circle_of_links_is_refused(folder):
    (folder / "a.bin").symlink_to("b.bin")
    (folder / "b.bin").symlink_to("a.bin")
    for read in (ds.load, lambda folder: describe_with(Path(folder), "a.bin")):
        with pytest.raises(CheckpointError, match=r"cannot be (followed|read)|leads out"):
            read(str(folder))


def test_of_the_hub_cache_only_the_blobs_of_the_same_repository(tmp_path):
    """Files as the cache of the Hugging Face hub has them: links of the snapshot to blobs of the repository."""
    repository = tmp_path / "models--org--name"
    other, snapshot = tmp_path / "models--org--secret" / "blobs", repository / "snapshots" / "0123abc"
    for made in (other, repository / "blobs", snapshot):
        made.mkdir(parents=True)
    for place in (repository / "blobs", repository, other):
        save_file({"x": torch.zeros(2)}, place / "f00d")
    (snapshot / "own").symlink_to("../../blobs/f00d")
    assert describe_with(snapshot, "own").num_tensors == 1
    (snapshot / "a").symlink_to(other / "f00d")
    (snapshot / "b").symlink_to("../../f00d")
    for name in "ab":
        with pytest.raises(CheckpointError, match="leads out"):
            describe_with(snapshot, name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "holds a list"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (LIMIT + 1, "64 at most"),
    ],
)
def test_json_that_is_none_or_beyond_the_limit(folder, content, message):
    with (folder / INDEX).open("wb") as file:
        file.truncate(content) if isinstance(content, int) else file.write(content)  # sparse: takes no disk
    with pytest.raises(CheckpointError, match=message):
        ds.describe_weights(folder)
