"""Is a file still what was written, byte for byte? Its SHA-256 is appended to it, and compared before anything is parsed."""

# The HDF5 library reads a damaged file with C code that may not end (one flipped bit in 1500 makes it loop: measured). A file
# whose bytes are those that were written is not damaged, so that this is known without the library. HDF5 reads what its
# superblock spans and ignores what follows; a program that changes the file cuts these bytes off, and then
# `content_digest` is what is left to compare.

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO, Literal

_PREFIX = b"\ndepthscope file sha256:"
_LENGTH = len(_PREFIX) + 64 + 1
_CHUNK = 1 << 20  # bytes


def write_with_digest(path: Path, content: bytes | memoryview) -> None:
    """Write a file, and the SHA-256 of its content after it."""
    with path.open("wb") as file:
        file.write(content)
        file.write(_PREFIX + hashlib.sha256(content).hexdigest().encode() + b"\n")


def compare_file_digest(path: Path) -> Literal["intact", "changed", "absent"]:
    """Whether a file is as it was when `write_with_digest` wrote it.

    Returns: ``"absent"`` for a file that ends in no digest: saved by an earlier version, by another program, or cut
    short.
    """
    size = path.stat().st_size - _LENGTH
    if size < 0:
        return "absent"
    with path.open("rb") as file:
        file.seek(size)
        ending = file.read(_LENGTH)
        if not (ending.startswith(_PREFIX) and ending.endswith(b"\n")):
            return "absent"
        stored = ending.removeprefix(_PREFIX).strip()
        return "intact" if _sha256(file, size).encode() == stored else "changed"


def _sha256(file: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0:
        block = file.read(min(_CHUNK, size))
        if not block:  # cut short while it is read
            break
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()
