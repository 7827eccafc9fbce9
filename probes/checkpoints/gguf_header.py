"""Does a GGUF file contain what its header counts? Every number is checked against the file before it is parsed."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.checkpoints.own_files import require_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# struct's codes of the scalar types, by their numbers in the file
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LEAST_KEY = 13  # bytes: a length, a type and one byte
LEAST_TENSOR = 24  # bytes: a length, a number of dimensions, a type, an offset
MOST_DIMENSIONS = 4  # of ggml
LONGEST_TEXT = 1000  # bytes of a setting that is kept; chat templates are longer
ALIGNMENT, DEFAULT_ALIGNMENT = "general.alignment", 32
# The reader of the gguf package makes several Python objects of every entry, about 500 bytes and 5 µs.
MOST_ARRAY_ENTRIES = 4_000_000


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header describes it; ``dimensions`` begin with the one that is contiguous in memory."""

    name: str
    dimensions: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufContents:
    """What the header of a GGUF file states about its size."""

    numbers: dict[str, float]
    """Settings that are one number, by key."""
    num_elements: int
    """Of all tensors together."""
    num_tensors: int
    largest_dimension: int
    texts: dict[str, str] = field(default_factory=dict)
    """Settings that are one text, by key."""
    tensors: tuple[GgufTensor, ...] = ()
    data_start: int = 0
    """Where the tensors' offsets count from."""
    byte_order: str = "<"


def check_gguf(file: Path) -> GgufContents:
    """Walk over the header of a GGUF file and refuse numbers that do not fit the file.

    Raises CheckpointError: If it is no regular file, no GGUF, torn, or counts more than it contains.
    """
    require_file(file)
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _contents(_Cursor(data, file))
    except (ValueError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _torn(file, str(error)) from error  # an empty file cannot be mapped


def _torn(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"cannot read '{file}' as GGUF: it is torn or of another kind ({reason}); copy or download it again"
    )


class _Cursor:
    """A place in a file, which moves over numbers and texts and never beyond the end."""

    def __init__(self, data: mmap.mmap, file: Path):
        self.data, self.file, self.at, self.order, self.entries = data, file, 0, "<", 0

    def skip(self, count: int) -> int:
        """Move over some bytes; returns where they begin."""
        begin = self.at
        if count > len(self.data) - begin:
            raise _torn(self.file, f"{count} bytes at {begin} are beyond its end")
        self.at += count
        return begin

    def number(self, code: str) -> Any:
        size = struct.calcsize(code)
        return struct.unpack_from(self.order + code, self.data, self.skip(size))[0]

    def text(self) -> str:
        length = self.number("Q")
        begin = self.skip(length)
        try:
            return self.data[begin : self.at].decode()
        except UnicodeDecodeError as error:
            raise _torn(self.file, "a name is not UTF-8") from error

    def value(self, kind: int, depth: int = 0) -> float | str | None:
        """Move over a value; returns it where it is a number or a short text."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            length = self.number("Q")
            begin = self.skip(length)
            # Entries of lists are as many as a vocabulary: they are passed over.
            return (
                self.data[begin : self.at].decode(errors="replace")
                if not depth and length <= LONGEST_TEXT
                else None
            )
        if kind != ARRAY or depth > 2:
            raise _torn(self.file, f"a value of the unknown type {kind}")
        kind, length = self.number("I"), self.number("Q")
        self.entries += length
        if self.entries > min(MOST_ARRAY_ENTRIES, len(self.data)):
            raise _torn(self.file, f"a list of {length} entries")
        if kind in SCALARS:
            self.skip(length * struct.calcsize(SCALARS[kind]))
        else:
            for _ in range(length):
                self.value(kind, depth + 1)
        return None


def _contents(cursor: _Cursor) -> GgufContents:
    if cursor.data[cursor.skip(len(MAGIC)) : cursor.at] != MAGIC:
        raise _torn(cursor.file, "it does not begin with GGUF")
    version = cursor.number("I")
    if version not in VERSIONS and version & 0xFFFF == 0:  # as written by a machine of the other byte order
        cursor.order, version = ">", version >> 24
    if version not in VERSIONS:
        raise _torn(cursor.file, f"version {version}, expected 2 or 3")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    if num_tensors * LEAST_TENSOR + num_keys * LEAST_KEY > len(cursor.data):
        raise _torn(cursor.file, f"{num_tensors} tensors and {num_keys} settings do not fit the file")
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    for _ in range(num_keys):
        key, kind = cursor.text(), cursor.number("I")
        value = cursor.value(kind)
        if isinstance(value, str):
            texts[key] = value
        elif value is not None:
            numbers[key] = value
    tensors = tuple(_tensors(cursor, num_tensors))
    alignment = int(numbers.get(ALIGNMENT, DEFAULT_ALIGNMENT)) or DEFAULT_ALIGNMENT
    return GgufContents(
        numbers,
        sum(math.prod(tensor.dimensions) for tensor in tensors),
        num_tensors,
        max((n for tensor in tensors for n in tensor.dimensions), default=0),
        texts,
        tensors,
        -(-cursor.at // alignment) * alignment,
        cursor.order,
    )


def _tensors(cursor: _Cursor, num_tensors: int) -> Iterator[GgufTensor]:
    for _ in range(num_tensors):
        name, num_dimensions = cursor.text(), cursor.number("I")
        if num_dimensions > MOST_DIMENSIONS:
            raise _torn(cursor.file, f"{ascii(name)[:80]} has {num_dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(num_dimensions))
        kind, offset = cursor.number("I"), cursor.number("Q")
        # No type of ggml has fewer than one bit an element.
        if offset > len(cursor.data) or math.prod(shape) > 8 * len(cursor.data):
            raise _torn(cursor.file, f"the data of {ascii(name)[:80]} are beyond its end")
        yield GgufTensor(name, shape, kind, offset)
