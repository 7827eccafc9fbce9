"""Is a Zarr store built only of what a run is written with? Its files, metadata, codecs, sizes and checksums."""

# Metadata of a store names the code that decodes it: with version 2 of the format the codec `pickle` runs any program. Only
# version 3 is read, and of its codecs those that a run is written with. A chunk that is missing would be read as NaN, and
# one with a flipped bit as a number: both are refused, with the name of the variable.

from __future__ import annotations

import itertools
import json
import math
import os
import stat
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from depthscope.diagnostics.schema.validation import (
    MAX_FILES,
    MAX_GROUPS,
    MAX_TEXT,
    MAX_VARIABLES,
    SchemaError,
    require_dense,
    require_room,
)

METADATA = "zarr.json"
MAX_CHUNK = 64 << 20
"""Bytes of a chunk in memory: as many as are decoded for one number of it."""

_ITEM_BYTES = {"bool": 1, "string": 64} | {  # a text of Python takes about 64 bytes, however short it is
    f"{kind}{bits}": bits // 8
    for kind, sizes in {"int": (8, 16, 32, 64), "float": (16, 32, 64), "complex": (64, 128)}.items()
    for bits in sizes
}
_ITEM_BYTES |= {f"u{name}": size for name, size in _ITEM_BYTES.items() if name.startswith("int")}
# Texts are not compressed: their number, for which the decoder makes room at once, is in the first bytes of a chunk.
_CODECS = (["bytes", "zstd", "crc32c"], ["bytes", "crc32c"], ["vlen-utf8", "crc32c"])
_ARRAY = (
    "shape data_type chunk_grid chunk_key_encoding fill_value codecs dimension_names storage_transformers"
)
_BOTH = ["zarr_format", "node_type", "attributes"]
_KEYS = {"group": {*_BOTH, "consolidated_metadata"}, "array": {*_BOTH, *_ARRAY.split()}}


class _Entry(NamedTuple):
    """One file of a store."""

    size: int
    open: Callable[[], IO[bytes]]


class _Array(NamedTuple):
    """What the metadata of an array say of its chunks: each is decoded completely, however small the array is."""

    is_text: bool
    is_compressed: bool
    shape: list[int]
    chunk: list[int]
    item_bytes: int

    @property
    def counts(self) -> list[int]:
        """How many chunks there are along each dim."""
        return [-(-size // chunk) for size, chunk in zip(self.shape, self.chunk, strict=True)]


def check_zarr(path: Path, max_bytes: int | None = None, *, chunks: bool = True) -> None:
    """Refuse a folder or zip file that has anything in it but arrays and groups of Zarr 3 as a run has them.

    ``max_bytes``: that all arrays may need; see `require_room`.
    ``chunks``: read each chunk once, a part at a time, and compare it with its checksum.
    """
    if path.is_dir():
        _check_entries(_folder_entries(path), max_bytes, chunks)
        return
    with zipfile.ZipFile(path) as archive:
        _check_entries(_zip_entries(path, archive), max_bytes, chunks)


def _folder_entries(path: Path) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    waiting = [path]
    while waiting:
        with os.scandir(waiting.pop()) as listing:
            for found in listing:
                name = Path(found.path).relative_to(path).as_posix()
                status = found.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(Path(found.path))
                elif stat.S_ISREG(status.st_mode):
                    require_dense(Path(found.path), status)
                    entries[name] = _Entry(status.st_size, partial(_opened, found.path))
                else:  # a link would show a file of another place under the name of this run
                    raise SchemaError(
                        f"{name} in it is a link, a pipe or a device; expected files and folders"
                    )
                if len(entries) + len(waiting) > MAX_FILES:
                    raise SchemaError(f"it has more than {MAX_FILES} files in it, which no run has")
    return entries


def _opened(path: str) -> IO[bytes]:
    return open(path, "rb")


def _zip_entries(path: Path, archive: zipfile.ZipFile) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for info in archive.infolist():
        name = info.filename
        if name in entries or str(PurePosixPath(name)) != name or name.startswith("/") or ".." in name:
            raise SchemaError(
                f"the member {name!r} of the zip file is there twice, or has no name of a file in a run"
            )
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.file_size != info.compress_size
            or info.flag_bits & 1
        ):
            raise SchemaError(
                f"the member {name} is compressed or encrypted; expected members as they are (stored)"
            )
        entries[name] = _Entry(info.file_size, partial(archive.open, info))
    if len(entries) > MAX_FILES or sum(entry.size for entry in entries.values()) > path.stat().st_size:
        raise SchemaError(f"it has more than {MAX_FILES} members, or members that share their bytes")
    return entries


def _check_entries(entries: Mapping[str, _Entry], max_bytes: int | None, chunks: bool) -> None:
    """Check the metadata files, then every other file against the array that it belongs to."""
    if METADATA not in entries:
        raise SchemaError(f"it has no {METADATA}: it is not a Zarr store of version 3")
    known = {name for name in entries if PurePosixPath(name).name == METADATA}
    documents = {name.removesuffix(METADATA).rstrip("/"): _document(name, entries[name]) for name in known}
    arrays = {
        path: _checked_array(f"/{path}", document)
        for path, document in documents.items()
        if document["node_type"] == "array"
    }
    if len(arrays) > MAX_VARIABLES or len(documents) - len(arrays) > MAX_GROUPS:
        raise SchemaError(
            f"it has more than {MAX_VARIABLES} variables or {MAX_GROUPS} groups, which no run has"
        )
    declared = sum(math.prod(array.shape) * array.item_bytes for array in arrays.values())
    require_room(declared, sum(entry.size for entry in entries.values()), max_bytes)
    if sum(math.prod(array.counts) for array in arrays.values()) > len(entries):
        raise SchemaError("its variables have more chunks than it has files: some are missing")
    for path, array in arrays.items():
        for place in itertools.product(*map(range, array.counts)):
            name = "/".join([path, "c", *map(str, place)])
            if name not in entries:
                raise SchemaError(f"/{path} has no chunk {name}: some of it is missing")
            known.add(name)
            _check_chunk(name, entries[name], array, complete=chunks)
    if unknown := sorted(set(entries) - known):
        raise SchemaError(f"{unknown[0]} in it belongs to no variable; remove it")


def _document(name: str, entry: _Entry) -> dict[str, Any]:
    try:
        with entry.open() as file:
            document = json.loads(file.read(MAX_TEXT))
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{name} is not JSON of at most {MAX_TEXT} bytes ({error})") from error
    kind = document.get("node_type") if isinstance(document, dict) else None
    if kind not in ("group", "array") or document.get("zarr_format") != 3:
        raise SchemaError(f"{name} is not metadata of a group or an array with zarr_format 3")
    unknown = sorted(set(document) - _KEYS[kind])
    # Consolidated metadata would be a second copy of all, which nobody has checked.
    if not isinstance(document.get("attributes", {}), dict):
        raise SchemaError(f"the attributes in {name} are not a JSON object")
    if unknown or document.get("consolidated_metadata") or document.get("storage_transformers"):
        raise SchemaError(
            f"{name} has {unknown or 'consolidated metadata or storage transformers'}; a run has none"
        )
    return document


def _checked_array(path: str, document: Mapping[str, Any]) -> _Array:
    kind, shape, codecs = (document.get(key, ()) for key in ("data_type", "shape", "codecs"))
    if not isinstance(kind, str) or kind not in _ITEM_BYTES:
        raise SchemaError(f"{path} has the type {kind!r}; expected numbers or text")
    try:
        chunk = document["chunk_grid"]["configuration"]["chunk_shape"]
        names = [codec["name"] for codec in codecs]
        # bool is an int in Python.
        is_shape = (
            all(type(size) is int and 0 <= size < 2**63 for size in [*shape, *chunk]) and 0 not in chunk
        )
    except (KeyError, TypeError):
        raise SchemaError(f"{path} has no shape, no regular chunks or no codecs") from None
    if not is_shape or not len(shape) == len(chunk) == len(document.get("dimension_names") or []):
        raise SchemaError(
            f"{path} has the shape {shape} in chunks of {chunk}; expected whole numbers, and named dims"
        )
    if names not in _CODECS or (kind == "string") != (names[0] == "vlen-utf8"):
        raise SchemaError(f"{path} has the codecs {names}; expected one of {_CODECS}")
    num_bytes = math.prod(chunk) * _ITEM_BYTES[kind]
    if num_bytes > MAX_CHUNK:
        raise SchemaError(f"{path} has chunks of {num_bytes} bytes; at most {MAX_CHUNK} are read")
    return _Array(kind == "string", "zstd" in names, shape, chunk, _ITEM_BYTES[kind])


def _check_chunk(name: str, entry: _Entry, array: _Array, *, complete: bool) -> None:
    from google_crc32c import extend

    with entry.open() as file:
        expected = math.prod(array.chunk) * (1 if array.is_text else array.item_bytes)
        if array.is_compressed:
            found = _size_of_frame(file, entry.size - 4)
        else:
            found = int.from_bytes(file.read(4), "little") if array.is_text else entry.size - 4
        if found != expected:
            raise SchemaError(f"{name} has {found} texts or bytes of data; expected {expected}: it is torn")
        checksum, last = 0, b""
        file.seek(0)
        while complete and (part := file.read(1 << 20)):
            checksum = extend(checksum, last[:-4])
            last = last[-4:] + part
        if complete and extend(checksum, last[:-4]) != int.from_bytes(last[-4:], "little"):
            raise SchemaError(f"{name} is damaged: its checksum is another one")


def _size_of_frame(file: IO[bytes], end: int) -> int:
    """Bytes that one frame of zstd decodes to, as it declares; -1 where it does not, or does not end at that byte.

    A decoder goes on with whatever follows, and two frames decode to more than the first one declares.
    """
    begin = file.read(14)
    if begin[:4] != b"\x28\xb5\x2f\xfd" or len(begin) < 9:
        return -1
    is_single, has_checksum = begin[4] >> 5 & 1, begin[4] >> 2 & 1
    width = (is_single, 2, 4, 8)[begin[4] >> 6]
    start = 6 - is_single + (0, 1, 2, 4)[begin[4] & 3]
    at, block = start + width, 0
    while not block & 1:  # the last block has this bit
        file.seek(at)
        block = int.from_bytes(file.read(3), "little")
        at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)  # of a repeated byte there is one
        if at > end:
            return -1
    size = int.from_bytes(begin[start : start + width], "little") + 256 * (width == 2)
    return size if width and at + 4 * has_checksum == end else -1
