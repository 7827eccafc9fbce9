"""Headers of safetensors files: every number is compared with the file, and damage of any kind is one sentence."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.checkpoints.safetensors_header import read_header

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b": torch.zeros(5, dtype=torch.bfloat16),
    "c": torch.ones(()),
}


@pytest.fixture
def file(tmp_path) -> Path:
    save_file(TENSORS, tmp_path / "m.safetensors", metadata={"format": "pt"})
    return tmp_path / "m.safetensors"


def rewrite(file: Path, change) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_what_safetensors_writes(file):
    found = {tensor.name: tensor for tensor in read_header(file)}
    assert {name: tensor.shape for name, tensor in found.items()} == {"a.weight": (3, 4), "b": (5,), "c": ()}
    assert found["b"].dtype == "BF16"
    raw = file.read_bytes()[found["a.weight"].start : found["a.weight"].stop]
    assert torch.equal(
        torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(3, 4), TENSORS["a.weight"]
    )


@pytest.mark.parametrize("length", [0, 20 << 30, 2**63 - 1, 2**64 - 1])
def test_a_wrong_length_takes_no_memory(file, length):
    raw = file.read_bytes()
    file.write_bytes(length.to_bytes(8, "little") + raw[8:])
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="torn or no safetensors file"):
        read_header(file)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


ENTRIES = {
    "beyond": {"data_offsets": [0, 10**12]},
    "beyond, as large as its shape": {"data_offsets": [0, 4 * 10**12], "shape": [10**12]},
    "negative": {"shape": [-3, -4]},
    "bool": {"shape": [True, 12]},
    "float": {"shape": [3.0, 4.0]},
    "huge float": {"shape": [1e30]},
    "text": {"shape": ["3", "4"]},
    "nested": {"shape": [[3], [4]]},
    "number": {"shape": 12},
    "many": {"shape": [1] * 100 + [12]},
    "overflow": {"shape": [2**62, 2**62]},
    "product too small": {"shape": [3, 3]},
    "backward": {"data_offsets": [48, 0]},
    "one": {"data_offsets": [48]},
    "float offsets": {"data_offsets": [0.0, 48.0]},
    "no offsets": {"data_offsets": None},
    "type": {"dtype": 5},
    "other type": {"dtype": "F64"},
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_an_entry_that_does_not_fit_the_file(file, kind):
    rewrite(file, lambda header: header["a.weight"].update(ENTRIES[kind]))
    with pytest.raises(CheckpointError, match="torn or no safetensors file"):
        read_header(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["c"].update(data_offsets=header["a.weight"]["data_offsets"], shape=[3, 4]),
        lambda header: header.update(b=None),
        lambda header: header.update(b=[1]),
        lambda header: header.update({"__metadata__": [1]}),
        lambda header: header.update({"__metadata__": {"a": 1}}),
        lambda header: {"\x1b[31mred": header.pop("b"), **header},
        lambda _: b"[]",
        lambda _: b"[" * 60_000,
        lambda _: b"\xff" * 50,
        lambda header: (
            json.dumps(header)[:-1].encode() + b', "b": ' + json.dumps(header["b"]).encode() + b"}"
        ),
    ],
    ids=["overlap", "null", "list", "metadata", "notes", "escape", "no object", "deep", "noise", "twice"],
)
def test_a_header_that_is_none(file, change):
    rewrite(file, change)
    with pytest.raises(CheckpointError, match="torn or no safetensors file"):
        read_header(file)


def test_a_partial_download_has_a_header(file):
    file.write_bytes(file.read_bytes()[:-10])
    assert len(read_header(file, complete=False)) == 3
    with pytest.raises(CheckpointError, match=r"describes [0-9]+ bytes, but the file has"):
        read_header(file)
