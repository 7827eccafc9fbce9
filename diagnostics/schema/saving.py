"""How does a run get to disk? As Zarr, a folder or one zipped file, that is complete before it gets its name."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope.diagnostics.atomic_writes import (
    entries_below,
    kind_of,
    replaced_file,
    replaced_folder,
    require_writable,
)
from depthscope.diagnostics.errors import TakenError
from depthscope.diagnostics.schema.attributes import encode_dataset
from depthscope.diagnostics.schema.groups import GROUPS
from depthscope.diagnostics.schema.validation import MAX_TEXT, SchemaError, validate
from depthscope.diagnostics.schema.zarr_stores import MAX_CHUNK, METADATA

LIVE = "live_store"
"""Attribute of a run that was opened from a live store: the fields of `Status`."""

ORDER = "order"
"""Attribute of a group on disk: its variables and groups in their order, as JSON; a folder lists them in any."""

SUFFIXES = (".zarr", ".zarr.zip")
"""Endings of saved runs: a folder, and one file to send."""


def suffix_of(path: Path) -> str:
    """Which of `SUFFIXES` a path ends in.

    Raises SchemaError: Where it ends in none of them, or has nothing before the ending.
    """
    if path.name in SUFFIXES:  # a hidden file, which no list of runs shows
        raise SchemaError(f"{path.name!r} is an ending without a name; put one before it")
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return suffix
    if path.suffix == ".nc":
        raise SchemaError(
            f"{path.name}: runs are Zarr, and netCDF is neither read nor written; name it {path.with_suffix('.zarr').name}, "
            "or write netCDF by run.to_netcdf(...) of xarray"
        )
    raise SchemaError(
        f"a run has a name that ends in {', '.join(SUFFIXES)}, or it is the folder of a live store; got {path.name!r}"
    )


def without_suffix(name: str) -> str:
    """The name of a run without the ending of its format; that of a live store has none."""
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def short_names(names: Sequence[str]) -> list[str]:
    """Names of runs without these endings; with them where two runs would have one name."""
    count = Counter(map(without_suffix, names))
    return [short if count[short := without_suffix(name)] == 1 else name for name in names]


def save_run(run: xr.DataTree, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write a run to a folder or file, which has its name once it is complete.

    Parameters
    ----------
    run : DataTree
        A run.
    path : path-like
        Ends in ``.zarr`` (a folder) or ``.zarr.zip`` (one file, to send).
    force : bool
        Replace an earlier run, when the new one is complete. A folder that is no run, or has files of others in it, is refused
        all the same.

    Returns
    -------
    Path
        Where it was written.

    Raises
    ------
    SchemaError
        Where the run breaks the contract or the ending is unknown.
    OSError
        Where the path cannot be written to; FileExistsError where what is there must stay.
    """
    target = Path(path)
    require_replaceable(target, force=force)
    validate(run)
    if LIVE in run.attrs:  # what a store was when it was opened; a copy of it does not grow
        run = run.copy()
        run.attrs = {name: value for name, value in run.attrs.items() if name != LIVE}
    encoded = run.map_over_datasets(encode_dataset)

    is_folder = suffix_of(target) == ".zarr"
    writer, write = (replaced_folder, _write_folder) if is_folder else (replaced_file, write_zip)
    with writer(target, check=partial(_require_run, suffix=suffix_of(target), force=force)) as fresh:
        write(encoded, fresh)
    return target


def write_zip(tree: xr.DataTree, path: Path) -> None:
    """Write an encoded tree as one file: a zip of the files of its Zarr folder, as they are.

    ``path``: in a folder of its own, in which the Zarr folder is written too.
    """
    folder = path.with_name("members")
    _write_folder(tree, folder)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in entries_below(folder):
            archive.write(folder / name, name.as_posix())


def _write_folder(tree: xr.DataTree, folder: Path) -> None:
    groups = {node.path: node.to_dataset(inherit=False).variables for node in tree.subtree}
    encodings = {path: {str(n): _encoding(v) for n, v in of.items()} for path, of in groups.items()}
    ordered = tree.copy()
    for node in ordered.subtree:
        if names := [*map(str, node.data_vars), *node.children]:
            node.attrs = {**node.attrs, ORDER: json.dumps(names)}
    try:
        ordered.to_zarr(folder, consolidated=False, zarr_format=3, encoding=encodings)
    except BaseException:
        from zarr.core.sync import sync  # loaded by now

        sync(_end_of_writes())
        raise


async def _end_of_writes() -> None:
    """Wait for what zarr still writes: it raises the first error, and a file that comes later would stay in the folder."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*tasks, return_exceptions=True)


def _encoding(variable: xr.Variable) -> dict[str, Any]:
    from zarr.codecs import Crc32cCodec, ZstdCodec  # 0.25 s

    # Texts as they are: how many there are is looked at before they are decoded.
    codecs = (Crc32cCodec(),) if variable.dtype.kind in "OUT" else (ZstdCodec(level=1), Crc32cCodec())
    # Chunks of fill values are written too: one that is missing is known to be lost.
    settings = {"compressors": codecs, "write_empty_chunks": True, "_FillValue": None}
    return settings | ({"chunks": _chunk_shape(variable)} if variable.size else {})


def _chunk_shape(variable: xr.Variable) -> tuple[int, ...]:
    """A depth each; else parts of the leading axes, so that the rows that are read together are stored together."""
    shape, item_bytes = list(variable.shape), 64 if variable.dtype.kind in "OUT" else variable.dtype.itemsize
    if variable.nbytes > 1 << 20 and variable.dims[0] in ("depth", "connection"):
        shape[0] = 1
    for axis in range(len(shape)):
        inner = item_bytes * math.prod(shape[axis + 1 :])
        shape[axis] = max(1, min(shape[axis], MAX_CHUNK // inner))
        if inner * shape[axis] <= MAX_CHUNK:
            break
    return tuple(shape)


def require_replaceable(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Refuse a path where no run can or may be saved, before anything expensive is computed; writes nothing.

    ``path``: where a run is going to be saved.
    ``force``: allow an earlier run there. Never allowed are a folder that is no run, or that has files of others in it, and
    what is neither a file nor a folder.
    Raises OSError: Where nothing can be written there; FileExistsError where what is there must stay.
    """
    suffix_of(Path(path))
    place = require_writable(path)
    if os.path.lexists(place):
        _require_run(place, suffix_of(Path(path)), force=force)


# A chunk of a Zarr 3 array: c/0/3 of an array with two dimensions, c of one with none.
_FILE = re.compile(rf"({METADATA}|({'|'.join(GROUPS)})/(.+/)?{METADATA}|({'|'.join(GROUPS)})/.+/c(/\d+)*)")


def _require_run(place: Path, suffix: str, *, force: bool) -> None:
    mode = place.lstat().st_mode
    # Pipes and devices among them: opening a pipe would wait for its other end, and reading a device may never end.
    if not (stat.S_ISDIR(mode) if suffix == ".zarr" else stat.S_ISREG(mode)):
        raise TakenError(f"{place} is {kind_of(mode)}, but a run of that ending is none; name another path")
    if stat.S_ISDIR(mode):
        if not os.listdir(place):
            return  # an empty folder belongs to nobody
        for entry in entries_below(place):
            if not (_FILE.fullmatch(entry.as_posix()) and stat.S_ISREG((place / entry).lstat().st_mode)):
                raise TakenError(
                    f"{place} contains {entry}, which is not a part of a run; move it away, or name another path"
                )
        _require_root_of_run(place)
    if not force:
        raise TakenError(f"{place} exists; replace it with force=True (--force), or name another path")


def _require_root_of_run(place: Path) -> None:
    try:
        with open(place / METADATA, "rb") as file:
            is_run = "schema_version" in json.loads(file.read(MAX_TEXT))["attributes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        is_run = False
    if not is_run:
        raise TakenError(
            f"{place} exists and is not a run: its {METADATA} has no schema_version; delete it, or name another path"
        )
