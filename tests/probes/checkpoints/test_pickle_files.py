"""Pickled weights: tensors load; code never runs; sizes beyond the file are refused before memory is taken."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.checkpoints.pickle_files import load_pickle, tensors_in

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "nested": {"b": [torch.ones(2)]}}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved(content, *, new: bool = True) -> Path:
    torch.save(content, "w.pt", _use_new_zipfile_serialization=new)
    return Path("w.pt")


@pytest.mark.parametrize("new", [True, False])
def test_both_formats_of_torch(new):
    content = load_pickle(saved(WEIGHTS, new=new))
    assert torch.equal(content["a"], WEIGHTS["a"])
    assert len(list(tensors_in(content))) == 2


@pytest.mark.parametrize("kind", ["zip", "older", "plain 2", "plain 4", "global", "build"])
def test_no_pickle_runs_code(kind):
    file = Path("w.pt")
    if kind == "zip":
        saved({"a": Evil()})
    elif kind == "older":
        saved({"a": Evil()}, new=False)
    elif kind == "global":  # the code alone, by the opcodes of the first protocol
        file.write_bytes(b"cos\nmkdir\n(S'evil-was-here'\ntR.")
    elif kind == "build":
        file.write_bytes(b"ctorch\nload\n)\x81(S'a'\ntb.")
    else:
        file.write_bytes(pickle.dumps({"a": Evil()}, protocol=int(kind[-1])))
    with pytest.raises(CheckpointError, match=r"would have to run code|cannot be read"):
        load_pickle(file)
    assert not Path("evil-was-here").exists()


def test_a_zip_that_unpacks_to_more_is_refused():
    source = zipfile.ZipFile(io.BytesIO(saved(WEIGHTS).read_bytes()))
    with zipfile.ZipFile("w.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in source.namelist():
            bomb.writestr(name, bytes(1 << 26) if name.endswith("/0") else source.read(name))
    assert Path("w.pt").stat().st_size < 1e6
    with pytest.raises(CheckpointError, match="compressed entries"):
        load_pickle(Path("w.pt"))


def test_a_zip_with_a_huge_list_of_entries_is_refused():
    raw = saved(WEIGHTS).read_bytes()
    end = raw.rfind(b"PK\x06\x06")
    size = (64 << 20).to_bytes(8, "little")
    Path("w.pt").write_bytes(raw[: end + 40] + size + raw[end + 48 :])
    with pytest.raises(CheckpointError, match="lists more entries"):
        load_pickle(Path("w.pt"))


def test_an_expanded_tensor_is_refused():
    with pytest.raises(CheckpointError, match="larger than the file"):
        load_pickle(saved({"a": torch.zeros(1).expand(10**6, 10**6)}))


def test_a_tensor_without_data_is_refused():
    with pytest.raises(CheckpointError, match="larger than the file"):
        load_pickle(saved({"a": torch.zeros(3, device="meta")}))


def test_a_storage_beyond_the_file_is_refused():
    raw = saved({"a": torch.zeros(7777)}, new=False).read_bytes()
    short, long = b"M" + (7777).to_bytes(2, "little"), b"J" + (2**31 - 1).to_bytes(4, "little")
    assert short in raw
    Path("w.pt").write_bytes(raw.replace(short, long))
    with pytest.raises(CheckpointError, match="cannot be read as torch weights"):
        load_pickle(Path("w.pt"))


def test_tuples_of_tuples_as_a_key_end_at_once():
    """Each of 60 tuples contains the one before twice: 2⁶⁰ steps to hash, in 300 bytes."""
    pairs = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    Path("w.pt").write_bytes(b"\x80\x02})" + pairs + b"K\x01s.")
    with pytest.raises(CheckpointError, match="tuples of tuples"):
        load_pickle(Path("w.pt"))


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04" + bytes(100), b"\x80\x02(((((", bytes(300), b"hello world"]
)
def test_what_is_no_pickle(content):
    Path("w.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_pickle(Path("w.pt"))


def test_a_pickle_without_end_ends():
    Path("w.pt").write_bytes(b"\x80\x02" + b"(" * (1 << 21) + b".")
    with pytest.raises(CheckpointError, match="more than 1000000 steps"):
        load_pickle(Path("w.pt"))
