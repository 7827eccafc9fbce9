"""Headers of GGUF files: counts, lengths and dimensions are compared with the file before anything is parsed."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.checkpoints.gguf_header import check_gguf

gguf = pytest.importorskip("gguf")


@pytest.fixture
def file(tmp_path) -> Path:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_block_count(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list(["a", "b", "ü"])
    writer.add_token_types([1, 1, 3])
    writer.add_tensor("token_embd.weight", np.zeros((6, 4), np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf"


def test_what_the_gguf_package_writes(file):
    contents = check_gguf(file)
    assert (contents.num_tensors, contents.num_elements, contents.largest_dimension) == (2, 28, 6)
    assert contents.numbers["llama.block_count"] == 2
    assert contents.numbers["llama.rope.freq_base"] == 10000.0


def number_after(raw: bytes, text: bytes, offset: int) -> int:
    return raw.index(text) + len(text) + offset


@pytest.mark.parametrize(
    ("place", "code", "value"),
    [
        (lambda raw: 4, "<I", 77),
        (lambda raw: 8, "<Q", 10**12),
        (lambda raw: 16, "<Q", 10**12),
        (lambda raw: 24, "<Q", 2**62),
        (lambda raw: number_after(raw, b"general.architecture", 4), "<Q", 2**63),
        (lambda raw: number_after(raw, b"general.architecture", 0), "<I", 99),
        (lambda raw: number_after(raw, b"tokenizer.ggml.tokens", 8), "<Q", 10**11),
        (lambda raw: number_after(raw, b"tokenizer.ggml.token_type", 8), "<Q", 2**60),
        (lambda raw: number_after(raw, b"token_embd.weight", 0), "<I", 10**9),
        (lambda raw: number_after(raw, b"token_embd.weight", 4), "<Q", 2**40),
        (lambda raw: number_after(raw, b"token_embd.weight", 24), "<Q", 2**40),
    ],
)
def test_numbers_beyond_the_file_take_neither_time_nor_memory(file, place, code, value):
    raw = bytearray(file.read_bytes())
    struct.pack_into(code, raw, place(raw), value)
    file.write_bytes(raw)
    tracemalloc.start()
    before = time.monotonic()
    with pytest.raises(CheckpointError, match=r"cannot read .*m\.gguf' as GGUF"):
        check_gguf(file)
    assert time.monotonic() - before < 2
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGML" + bytes(100), b"GGUF\x03\x00\x00\x00"])
def test_what_is_no_gguf(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="as GGUF"):
        check_gguf(tmp_path / "x.gguf")
