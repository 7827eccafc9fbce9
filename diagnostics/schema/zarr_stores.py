"""Is a Zarr store built only of what a run is written with? Its files, metadata, codecs and sizes, before any is decoded."""

# Metadata of a store names the code that decodes it: with version 2 of the format the codec `pickle` runs any program. Only
# version 3 is read, and of its codecs those that a run is written with.

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.schema.limits import (
    MAX_DEPTH,
    MAX_FILES,
    MAX_GROUPS,
    MAX_JSON_DEPTH,
    MAX_TEXT,
    MAX_VARIABLES,
    Limit,
)
from depthscope.diagnostics.schema.validation import SchemaError

METADATA = "zarr.json"
# Bytes of a number, by the name of its type.
_ITEM_BYTES = {
    "bool": 1,
    **{f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": bits // 8 for bits in (16, 32, 64)},
    **{f"complex{bits}": bits // 8 for bits in (64, 128)},
}
_TEXT = "string"
# A text of Python takes about 50 bytes and a reference, however short it is.
_TEXT_BYTES = 64
_ARRAY_KEYS = {
    *("zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value"),
    *("codecs", "attributes", "dimension_names", "storage_transformers"),
}
_GROUP_KEYS = {"zarr_format", "node_type", "attributes", "consolidated_metadata"}
_CRC_BYTES = 4


@dataclass(frozen=True)
class _Entry:
    """One file of a store."""

    path: str
    size: int

    def read(self, count: int) -> bytes:
        """Its first bytes."""
        with open(self.path, "rb") as file:
            return file.read(count)


@dataclass(frozen=True)
class _Array:
    """The metadata of an array, as far as they are needed to check its chunks."""

    path: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    item_bytes: int
    is_text: bool
    has_checksum: bool


def check_zarr_folder(path: Path, max_bytes: int | None) -> None:
    """Refuse a folder that has anything in it but arrays and groups of Zarr 3 as a run has them."""
    entries: dict[str, _Entry] = {}
    waiting = [path]
    while waiting:
        with os.scandir(waiting.pop()) as listing:
            for found in listing:
                name = Path(found.path).relative_to(path).as_posix()
                mode = found.stat(follow_symlinks=False).st_mode
                # A link would show a file of another place under the name of this run.
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise SchemaError(
                        f"{name} in it is a link, a pipe or a device; expected files and folders"
                    )
                if stat.S_ISDIR(mode):
                    waiting.append(Path(found.path))
                else:
                    entries[name] = _Entry(found.path, found.stat().st_size)
                if len(entries) + len(waiting) > MAX_FILES:
                    raise SchemaError(f"it has more than {MAX_FILES} files in it, which no run has")
    _check_entries(entries, max_bytes)


def _check_entries(entries: Mapping[str, _Entry], max_bytes: int | None) -> None:
    """Check the metadata files, then every other file against the array that it belongs to."""
    if METADATA not in entries:
        raise SchemaError(f"it has no {METADATA}: it is not a Zarr store of version 3")
    arrays = _checked_arrays(entries)
    limit = Limit.of(sum(entry.size for entry in entries.values()), max_bytes)
    limit.check(sum(math.prod(array.shape) * array.item_bytes for array in arrays.values()))
    num_chunks: Counter[str] = Counter()
    for name, entry in entries.items():
        if PurePosixPath(name).name != METADATA:
            num_chunks[_check_chunk(name, entry, arrays, limit).path] += 1
    for array in arrays.values():
        expected = math.prod(-(-size // chunk) for size, chunk in zip(array.shape, array.chunk, strict=True))
        if num_chunks[array.path] != expected:
            raise SchemaError(
                f"/{array.path} has {num_chunks[array.path]} chunks; expected {expected}: some are missing"
            )


def _checked_arrays(entries: Mapping[str, _Entry]) -> dict[str, _Array]:
    """The arrays by their paths; groups are checked on the way."""
    arrays: dict[str, _Array] = {}
    num_groups = 0
    for name, entry in entries.items():
        if PurePosixPath(name).name != METADATA:
            continue
        path = name.removesuffix(METADATA).rstrip("/")
        document = _document(name, entry)
        if document["node_type"] == "array":
            arrays[path] = _checked_array(path, document)
        else:
            _check_group(path, document)
            num_groups += 1
        if num_groups > MAX_GROUPS or len(arrays) > MAX_VARIABLES:
            raise SchemaError(
                f"it has more than {MAX_VARIABLES} variables or {MAX_GROUPS} groups, which no run has"
            )
    return arrays


def _document(name: str, entry: _Entry) -> dict[str, Any]:
    if entry.size > MAX_TEXT:
        raise SchemaError(f"{name} has {entry.size} bytes; at most {MAX_TEXT} are read")
    try:
        document = json.loads(entry.read(entry.size), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{name} is not JSON that can be read ({error})") from error
    if not isinstance(document, dict):
        raise SchemaError(f"{name} is a {type(document).__name__}; expected metadata of Zarr 3")
    if _depth(document) > MAX_JSON_DEPTH:
        raise SchemaError(f"{name} is nested more than {MAX_JSON_DEPTH} deep")
    if document.get("zarr_format") != 3 or document.get("node_type") not in ("group", "array"):
        raise SchemaError(
            f"{name} has zarr_format {document.get('zarr_format')!r} and node_type {document.get('node_type')!r}; "
            "expected 3, and 'group' or 'array'"
        )
    return document


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of two values of one key another reader may take the other one.
    if len({key for key, _ in pairs}) < len(pairs):
        raise InputError("a key occurs twice")
    return dict(pairs)


def _depth(document: Any) -> int:
    """How deep lists and objects are nested; without recursion, which is what is limited here."""
    deepest, waiting = 0, [(document, 1)]
    while waiting:
        value, depth = waiting.pop()
        deepest = max(deepest, depth)
        if isinstance(value, dict):
            waiting += [(each, depth + 1) for each in value.values()]
        elif isinstance(value, list):
            waiting += [(each, depth + 1) for each in value]
    return deepest


def _check_group(path: str, document: Mapping[str, Any]) -> None:
    _require_keys(path, document, _GROUP_KEYS)
    if len(PurePosixPath(path).parts) > MAX_DEPTH:
        raise SchemaError(f"/{path} is more than {MAX_DEPTH} groups deep")
    # A second copy of all metadata, which nobody has checked.
    if document.get("consolidated_metadata") is not None:
        raise SchemaError(f"/{path} has consolidated metadata; a run has none")


def _require_keys(path: str, document: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(document) - known)
    if unknown:
        raise SchemaError(f"the metadata of /{path} have {', '.join(unknown[:3])}, which a run has not")
    if not isinstance(document.get("attributes", {}), dict):
        raise SchemaError(f"the attributes of /{path} are not a JSON object")


def _checked_array(path: str, document: Mapping[str, Any]) -> _Array:
    _require_keys(path, document, _ARRAY_KEYS)
    if document.get("storage_transformers"):
        raise SchemaError(f"/{path} has storage transformers; a run has none")
    data_type = document.get("data_type")
    is_text = data_type == _TEXT
    if not isinstance(data_type, str) or not (is_text or data_type in _ITEM_BYTES):
        raise SchemaError(f"/{path} has the type {data_type!r}; expected numbers or text")
    grid, keys = document.get("chunk_grid"), document.get("chunk_key_encoding")
    if not isinstance(grid, dict) or grid.get("name") != "regular":
        raise SchemaError(f"/{path} has the chunk grid {grid!r}; expected a regular one")
    if (
        not isinstance(keys, dict)
        or keys.get("name") != "default"
        or _configuration(keys).get("separator", "/") != "/"
    ):
        raise SchemaError(f"/{path} has the chunk keys {keys!r}; expected the default ones")
    shape = _sizes(path, "shape", document.get("shape"), least=0)
    chunk = _sizes(path, "chunk_shape", _configuration(grid).get("chunk_shape"), least=1)
    if len(chunk) != len(shape):
        raise SchemaError(f"/{path} has the shape {shape} and chunks of the shape {chunk}")
    names = document.get("dimension_names") or []  # absent for a scalar
    if (
        not isinstance(names, list)
        or len(names) != len(shape)
        or not all(isinstance(name, str) for name in names)
    ):
        raise SchemaError(f"/{path} has the dimension names {names!r} for the shape {shape}")
    item_bytes = _TEXT_BYTES if is_text else _ITEM_BYTES[data_type]
    has_checksum = _has_checksum(path, document.get("codecs"), is_text)
    return _Array(path, shape, chunk, item_bytes, is_text, has_checksum)


def _configuration(part: Mapping[str, Any]) -> Mapping[str, Any]:
    configuration = part.get("configuration", {})
    return configuration if isinstance(configuration, dict) else {}


def _sizes(path: str, what: str, sizes: Any, *, least: int) -> tuple[int, ...]:
    # bool is an int in Python.
    valid = isinstance(sizes, list) and all(type(size) is int and least <= size < 2**63 for size in sizes)
    if not valid:
        raise SchemaError(f"/{path} has the {what} {sizes!r}; expected whole numbers from {least} on")
    return tuple(sizes)


def _has_checksum(path: str, codecs: Any, is_text: bool) -> bool:
    names = (
        [codec.get("name") if isinstance(codec, dict) else None for codec in codecs]
        if isinstance(codecs, list)
        else []
    )
    first = "vlen-utf8" if is_text else "bytes"
    if names[:1] != [first] or names[1:] not in ([], ["crc32c"]):
        raise SchemaError(
            f"/{path} has the codecs {codecs!r}; expected {first} and a checksum crc32c".replace("\n", " ")
        )
    return names[1:] == ["crc32c"]


def _check_chunk(name: str, entry: _Entry, arrays: Mapping[str, _Array], limit: Limit) -> _Array:
    array = _array_of(name, arrays)
    if array is None:
        raise SchemaError(f"{name} in it belongs to no variable; remove it")
    expected = math.prod(array.chunk) * array.item_bytes
    # A chunk is decoded completely, however small the array is.
    limit.check(expected)
    stored = entry.size - (_CRC_BYTES if array.has_checksum else 0)
    if not array.is_text and stored != expected:
        raise SchemaError(f"{name} has {stored} bytes of data; expected {expected}: it is torn")
    # Labels are read by xarray when it opens the store, and its error names no variable.
    if array.has_checksum and len(array.shape) <= 1:
        _check_crc(name, entry.read(entry.size))
    if array.is_text:
        limit.check(stored)
        # Texts begin with their number, for which the decoder makes room before it reads them.
        (count,) = struct.unpack("<L", entry.read(4).ljust(4, b"\0"))
        if count != math.prod(array.chunk):
            raise SchemaError(f"{name} has {count} texts; expected {math.prod(array.chunk)}: it is torn")
    return array


def _check_crc(name: str, data: bytes) -> None:
    from google_crc32c import value as crc32c

    if crc32c(data[:-_CRC_BYTES]) != int.from_bytes(data[-_CRC_BYTES:], "little"):
        raise SchemaError(f"{name} is damaged: its checksum is another one")


def _array_of(name: str, arrays: Mapping[str, _Array]) -> _Array | None:
    """The array that a chunk belongs to: ``trace/residual/c/0/0`` is the first one of trace/residual."""
    parts = name.split("/")
    for length in range(len(parts) - 1, 0, -1):
        array = arrays.get("/".join(parts[:length]))
        if array is None:
            continue
        index = parts[length + 1 :]
        valid = parts[length] == "c" and len(index) == len(array.shape) and all(map(str.isdecimal, index))
        inside = valid and all(
            place == str(int(place)) and int(place) < -(-size // chunk)
            for place, size, chunk in zip(index, array.shape, array.chunk, strict=True)
        )
        return array if inside else None
    return None
