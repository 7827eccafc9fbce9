"""May a run take the place of what is at a path? Only of an earlier run; told by a look that reads no array."""

from __future__ import annotations

import json
import os
import re
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from depthscope.diagnostics.atomic_writes import entries_below, kind_of, require_writable
from depthscope.diagnostics.schema.formats import suffix_of
from depthscope.diagnostics.schema.groups import GROUPS
from depthscope.diagnostics.schema.validation import SchemaError, check_version

# Bytes. A root's metadata takes some kilobytes, and the directory of a zip some hundred bytes a chunk; what takes more than
# this is no run of ours and is not read (a heuristic of ours).
METADATA_LIMIT = 64 << 20
# A chunk of a zarr 3 array: c/0/3 of an array with two dimensions, c of one with none.
_CHUNK = re.compile(r"(?P<array>.+)/c(?P<position>(?:/\d+)*)")


def require_replaceable(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Refuse a path where no run can or may be saved, before anything expensive is computed; writes nothing.

    Parameters
    ----------
    path : path-like
        Where a run is going to be saved.
    force : bool
        Also allow a file that is no run: torn, of a newer schema, or of another program. Never allowed are files of others
        inside a folder, and what is neither a file nor a folder.

    Raises
    ------
    SchemaError
        Where the ending is unknown.
    OSError
        Where nothing can be written there; FileExistsError where what is there must stay.
    """
    suffix = suffix_of(Path(path))
    place = require_writable(path)
    if os.path.lexists(place):
        require_run(place, suffix, force=force)


def require_run(place: Path, suffix: str, *, force: bool = False) -> None:
    """Refuse to replace what is at a path unless it is a run.

    Parameters
    ----------
    place : Path
        Exists.
    suffix : str
        One of `SUFFIXES`.
    force : bool
        As in `require_replaceable`.

    Raises
    ------
    FileExistsError
        With what is there and what to do.
    """
    mode = place.lstat().st_mode
    # Special files first: opening a pipe would wait for its other end, and reading a device may never end.
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise FileExistsError(f"{place} is {kind_of(mode)}, which no run replaces; name another path")
    if stat.S_ISDIR(mode):
        if suffix != ".zarr":
            raise FileExistsError(
                f"{place} is a folder, but a run that ends in {suffix} is a file; name another path"
            )
        foreign = next(files_of_others(place, any_store=force), None)
        if foreign is not None:
            raise FileExistsError(
                f"{place} contains {foreign}, which is no part of a run; move it away, or name another path"
            )
        if not os.listdir(place):
            return  # an empty folder belongs to nobody
    if force:
        return
    try:
        check_version(_root_attrs(place, suffix))
    # Every library has its own errors for a file that is torn or of another kind; RecursionError: JSON in JSON in JSON.
    except Exception as error:
        reason = str(error) if isinstance(error, SchemaError) else f"{type(error).__name__}: {error}"
        raise FileExistsError(
            f"{place} exists and is no run that this depthscope may replace ({' '.join(reason.split())[:300]}); "
            "name another path, delete it, or replace it with force=True (--force)"
        ) from None


def _root_attrs(place: Path, suffix: str) -> Mapping[str, Any]:
    if suffix == ".nc":
        return _netcdf_attrs(place)
    if suffix == ".zarr":
        return _group_attrs(_read_json(place / "zarr.json"))
    with place.open("rb") as file:
        _require_small_directory(file)
        with zipfile.ZipFile(file) as archive:
            entry = archive.getinfo("zarr.json")
            # Ours are stored as they are, since the chunks are compressed already; a few packed bytes may unpack to gigabytes.
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > METADATA_LIMIT:
                raise ValueError("its zarr.json is not one that depthscope wrote")
            return _group_attrs(json.loads(archive.read(entry)))


def _netcdf_attrs(place: Path) -> Mapping[str, Any]:
    import h5py

    with h5py.File(place, "r") as file:
        if "schema_version" not in file.attrs:
            return {}
        described = file.attrs.get_id("schema_version")
        if (
            described.shape != () or described.dtype.itemsize > 1024
        ):  # only a version is read, however long it claims to be
            raise ValueError("its schema_version is no text")
        return {"schema_version": file.attrs["schema_version"]}


def _require_small_directory(file: BinaryIO) -> None:
    """Refuse a zip whose list of files is so long that reading it would fill the memory."""
    size = file.seek(0, os.SEEK_END)
    # The end record, and the comment of up to 64 KiB that may follow it.
    tail = min(size, 22 + (1 << 16))
    file.seek(size - tail)
    _, found, record = file.read(tail).rpartition(b"PK\x05\x06")
    if not found or len(record) < 18:
        raise ValueError("it is no zip file")
    (directory,) = struct.unpack_from("<I", record, 8)
    # All ones: the number is in the record of a zip beyond 4 GiB, which may have as long a list as it likes.
    if directory > METADATA_LIMIT and directory != 0xFFFFFFFF:
        raise ValueError("its list of files is longer than that of any run")
    if directory == 0xFFFFFFFF:
        raise ValueError("its list of files is longer than 4 GiB")


def _read_json(path: Path) -> Any:
    described = path.lstat()
    if not stat.S_ISREG(described.st_mode) or described.st_size > METADATA_LIMIT:
        raise ValueError(f"{path.name} is no small file")
    return json.loads(path.read_bytes())


def _group_attrs(metadata: Any) -> Mapping[str, Any]:
    if metadata["zarr_format"] != 3 or metadata["node_type"] != "group":
        raise ValueError("its root is no group of zarr 3")
    return dict(metadata["attributes"])


def files_of_others(store: Path, *, any_store: bool = False) -> Iterator[str]:
    """Files in a zarr folder that no run has: all but the metadata of its groups and the chunks that these name.

    Parameters
    ----------
    store : Path
        The folder.
    any_store : bool
        Take every file for ours that has the name of a zarr 3 file, also where the metadata is torn or of another program.

    Yields
    ------
    str
        Path below the folder.
    """
    counts: dict[
        str, tuple[int, ...]
    ] = {}  # by the path of an array, how many chunks it has along each dimension
    for entry in entries_below(store):
        name = entry.as_posix()
        known_group = any_store or name == "zarr.json" or name.partition("/")[0] in GROUPS
        # A link is nobody's chunk, and what it points to is not ours.
        if not known_group or not stat.S_ISREG((store / entry).lstat().st_mode):
            yield name
        elif entry.name != "zarr.json":
            match = _CHUNK.fullmatch(name)
            if match is None or not (any_store or _is_chunk(store, match, counts)):
                yield name


def _is_chunk(store: Path, match: re.Match[str], counts: dict[str, tuple[int, ...]]) -> bool:
    """Whether the metadata of an array name a chunk of this position."""
    array = match["array"]
    if array not in counts:
        try:
            metadata = _read_json(store / array / "zarr.json")
            chunk_shape = metadata["chunk_grid"]["configuration"]["chunk_shape"]
            pairs = zip(metadata["shape"], chunk_shape, strict=True)
            counts[array] = tuple(-(-int(size) // int(chunk)) for size, chunk in pairs)
        # Torn, of another program, or nested too deep: in each case it names no chunk.
        except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
            counts[array] = (0,)
    position = [int(index) for index in match["position"].split("/")[1:]]
    return len(position) == len(counts[array]) and all(
        index < count for index, count in zip(position, counts[array], strict=True)
    )
