"""May a run take the place of what is at a path? Only of an earlier run; recognised without reading an array."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from depthscope.diagnostics.atomic_writes import entries_below, kind_of, require_writable
from depthscope.diagnostics.errors import TakenError
from depthscope.diagnostics.schema.file_digest import compare_file_digest
from depthscope.diagnostics.schema.formats import suffix_of
from depthscope.diagnostics.schema.groups import GROUPS
from depthscope.diagnostics.schema.trial import open_in_trial
from depthscope.diagnostics.schema.validation import SchemaError, check_version
from depthscope.diagnostics.schema.zarr_stores import METADATA, check_zarr_folder

# A chunk of a Zarr 3 array: c/0/3 of an array with two dimensions, c of one with none.
_CHUNK = re.compile(r".+/c(/\d+)*")
# No array is read, so that any size will do.
_NO_LIMIT = 1 << 62


def require_replaceable(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Refuse a path where no run can or may be saved, before anything expensive is computed; writes nothing.

    ``path``: where a run is going to be saved.
    ``force``: also allow a file that is no run: torn, of a newer schema, or of another program. Never allowed are files
    of others inside a folder, and what is neither a file nor a folder.
    Raises OSError: Where nothing can be written there; FileExistsError where what is there must stay.
    """
    suffix = suffix_of(Path(path))
    place = require_writable(path)
    if os.path.lexists(place):
        require_run(place, suffix, force=force)


def require_run(place: Path, suffix: str, *, force: bool = False) -> None:
    """Refuse to replace what is at a path unless it is a run."""
    mode = place.lstat().st_mode
    # Special files first: opening a pipe would wait for its other end, and reading a device may never end.
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise TakenError(f"{place} is {kind_of(mode)}, which no run replaces; name another path")
    if stat.S_ISDIR(mode):
        if suffix != ".zarr":
            raise TakenError(
                f"{place} is a folder, but a run that ends in {suffix} is a file; name another path"
            )
        foreign = next(files_of_others(place, any_store=force), None)
        if foreign is not None:
            raise TakenError(
                f"{place} contains {foreign}, which is not a part of a run; move it away, or name another path"
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
        raise TakenError(
            f"{place} exists and is not a run that this depthscope may replace ({' '.join(reason.split())[:300]}); "
            "name another path, delete it, or replace it with force=True (--force)"
        ) from None


def _root_attrs(place: Path, suffix: str) -> Mapping[str, Any]:
    """The root's attributes; what cannot be a run is refused by the checks that `open_run` begins with."""
    if suffix == ".nc":
        return _netcdf_attrs(place)
    check_zarr_folder(place, _NO_LIMIT)
    return dict(json.loads((place / METADATA).read_bytes())["attributes"])


def _netcdf_attrs(place: Path) -> Mapping[str, Any]:
    if compare_file_digest(place) != "intact":
        # Damaged, of an earlier version or of another program: the HDF5 library may crash on it, and the measurement that is
        # to be saved would be lost.
        open_in_trial(place, verify=False, max_bytes=_NO_LIMIT)
    import h5py

    with h5py.File(place, "r") as file:
        return dict(file.attrs)


def files_of_others(store: Path, *, any_store: bool = False) -> Iterator[str]:
    """What is in a Zarr folder and has no name that a file of a run has.

    ``any_store``: whether groups that no run has are taken for a run's.
    Yields: Path below the folder; links, special files and empty folders are among them.
    """
    for entry in entries_below(store):
        name = entry.as_posix()
        known_group = any_store or name == METADATA or name.partition("/")[0] in GROUPS
        is_file = stat.S_ISREG((store / entry).lstat().st_mode)
        if not (known_group and is_file and (entry.name == METADATA or _CHUNK.fullmatch(name))):
            yield name
