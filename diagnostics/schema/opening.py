"""How does a run get from disk? Checked before any of it is believed; its arrays are read when they are used."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope.diagnostics.errors import AbsentError
from depthscope.diagnostics.schema.attributes import decode_attrs, decode_dataset
from depthscope.diagnostics.schema.content_digest import CONTENT_DIGEST, content_digest, describe_differences
from depthscope.diagnostics.schema.file_digest import compare_file_digest
from depthscope.diagnostics.schema.formats import suffix_of
from depthscope.diagnostics.schema.groups import group_path
from depthscope.diagnostics.schema.hdf5_files import check_hdf5
from depthscope.diagnostics.schema.joining import PARTS, join_parts, parts_of
from depthscope.diagnostics.schema.limits import require_ordinary
from depthscope.diagnostics.schema.live_store_files import (
    COLUMNS,
    files_of,
    is_live_store,
    live_log_of,
    newest_state,
)
from depthscope.diagnostics.schema.live_store_reading import open_live
from depthscope.diagnostics.schema.trial import open_in_trial
from depthscope.diagnostics.schema.validation import SchemaError, validate
from depthscope.diagnostics.schema.zarr_stores import check_zarr_folder

logger = logging.getLogger(__name__)

VERIFIED = "verified"
WITHOUT_DIGEST = (
    "not verified: it was saved without checksums, by an earlier version or another program; save it again"
)
NOT_ASKED = "not verified: its checksums were not compared"

# Values as stored: a run has no dates, and no packed numbers. A unit such as "s" must not become a time span.
_DECODING: dict[str, Any] = {"decode_times": False, "decode_timedelta": False}


def open_run(
    path: str | os.PathLike[str], *, verify: bool = True, max_bytes: int | None = None
) -> xr.DataTree:
    """Open a saved run; arrays are read when they are used.

    Only what `save_run` writes is opened, whatever the file claims about itself: plain arrays of numbers and text, in the
    file or folder itself, without filters but checksums. This is checked in the metadata before any array is read.

    Parameters
    ----------
    path : path-like
        A ``.nc`` file, a ``.zarr`` folder, or the folder of a live store, which may be growing: its
        attribute ``live`` tells. Of a live store the variables of every step are compared with their checksums when they are
        read.
    verify : bool
        Read everything once and compare it with the digests that were saved with it. `integrity` tells the result. A run of
        an earlier version has none; it is opened with a note in the log.
    max_bytes : int, optional
        Most bytes that all arrays of the run may have in memory; by default 256 MiB and 8 times the bytes on disk.

    Returns
    -------
    DataTree

    Raises
    ------
    AbsentError
        Where the path does not exist.
    SchemaError
        For a damaged, foreign or newer file, for one with anything in it that a run does not have, and above `max_bytes`.
    """
    source = Path(path)
    if is_live_store(source):
        return _open_live(source, verify=verify, max_bytes=max_bytes)
    if parts := parts_of(source):
        return _open_parts(source, parts, lambda part: open_run(part, verify=verify, max_bytes=max_bytes))
    if not source.suffix and not source.exists():
        raise AbsentError(f"no run at {source}; a live store is there from its first measured step on")
    suffix = suffix_of(source)
    if not source.exists():
        log = live_log_of(source)
        hint = (
            f"the steps that were measured until its writer ended are in {log}"
            if is_live_store(log)
            else "list the runs of a folder with: depthscope dashboard FOLDER"
        )
        raise AbsentError(f"no run at {source}; {hint}")
    try:
        require_ordinary(source, folder=suffix == ".zarr")
        known = _known_integrity(source, verify=verify, max_bytes=max_bytes) if suffix == ".nc" else None
        run = open_here(source, verify=verify and known is None, max_bytes=max_bytes)
    except SchemaError as error:
        raise SchemaError(f"{source}: {error}") from None
    # Each library has its own errors for a damaged file; RecursionError and MemoryError are among them.
    except Exception as error:
        raise SchemaError(f"{source}: {unreadable(source, error)}") from error
    if known is not None:
        run.encoding[_INTEGRITY] = known
    if run.encoding[_INTEGRITY] == WITHOUT_DIGEST:
        logger.warning("%s: %s", source, WITHOUT_DIGEST)
    return run


def _open_parts(source: Path, parts: Sequence[Path], open_part: Callable[[Path], xr.DataTree]) -> xr.DataTree:
    """The run whose parts are in a folder; a part that cannot be opened is named, and the others are shown."""
    runs: dict[str, xr.DataTree] = {}
    unreadable: dict[str, str] = {}
    for part in parts:
        try:
            runs[part.name] = open_part(part)
        except (SchemaError, AbsentError) as error:
            unreadable[part.name] = str(error)
    if not runs:
        raise SchemaError(f"{source}: no part of it can be opened: {next(iter(unreadable.values()))}")
    try:
        joined = join_parts(runs).load()
        joined.attrs[PARTS] = {**joined.attrs[PARTS], **({"unreadable": unreadable} if unreadable else {})}
        validate(joined)
    except SchemaError as error:
        raise SchemaError(f"{source}: {error}") from None
    finally:
        for run in runs.values():
            run.close()
    return joined


def open_group(
    path: str | os.PathLike[str], group: str, chain: str = "", *, max_bytes: int | None = None
) -> xr.Dataset:
    """One group of a run that `open_run` has opened and verified before; arrays are read when they are used.

    The metadata of a run with many metrics take seconds to read: for a look at its states alone this reads those of their
    group. Nothing is compared with digests and nothing is validated.

    ``chain``: the chain's name, empty where the run has one.
    Returns: Of a live store what its newest state has; where that has steps, they are of the state alone.
    Raises AbsentError: Where there is no such group.
    Raises SchemaError: For what `open_run` refuses.
    """
    source = Path(path)
    if is_live_store(source):
        return _open_group_of_state(source, group, chain, max_bytes)
    suffix = suffix_of(source)
    if not source.exists():
        raise AbsentError(f"no run at {source}")
    try:
        require_ordinary(source, folder=suffix == ".zarr")
        _CHECKS[suffix](source, max_bytes)
        opened = _open_one(source, suffix, group_path(group, chain))
        decoded = decode_dataset(opened)
        decoded.set_close(opened.close)  # the decoded one is new and does not know the open file
        return decoded
    except SchemaError as error:
        raise SchemaError(f"{source}: {error}") from None
    except Exception as error:
        # xarray has no error of its own for it: that of h5netcdf is an OSError, that of zarr a FileNotFoundError.
        if isinstance(error, FileNotFoundError) or "group not found" in str(error):
            raise AbsentError(f"{source}: it has no group {group_path(group, chain)}") from None
        raise SchemaError(f"{source}: {unreadable(source, error)}") from error


def _open_group_of_state(store: Path, group: str, chain: str, max_bytes: int | None) -> xr.Dataset:
    for _ in range(5):
        state = newest_state(store)
        if state is None:
            raise SchemaError(f"{store}: no step was finished in it yet")
        try:
            return open_group(state, group, chain, max_bytes=max_bytes)
        except (AbsentError, SchemaError):
            if os.path.lexists(state):
                raise
        # Its writer has just removed it for a newer one.
    raise SchemaError(f"{store}: its files change faster than they can be opened; try again")


def _open_live(store: Path, *, verify: bool, max_bytes: int | None) -> xr.DataTree:
    def open_state(path: Path) -> xr.DataTree:
        return open_run(path, verify=verify, max_bytes=max_bytes)

    try:
        run = open_live(store, open_state, verify=verify, max_bytes=max_bytes)
    except SchemaError as error:
        raise SchemaError(f"{store}: {error}") from None
    if verify and any(name.startswith(COLUMNS) for name in files_of(store)[0]):
        run.encoding[_INTEGRITY] += "; the columns of older rows when they are read"
    return run


def integrity(run: xr.DataTree) -> str:
    """Whether a run is what was saved.

    ``run``: as `open_run` returned it.
    Returns: ``"verified"``, or ``"not verified: "`` and why.
    """
    return str(run.encoding.get(_INTEGRITY, "not verified: it was not opened from a file"))


# In the encoding, where xarray has what is known of a file: the attributes are the user's, and equal those that were saved.
_INTEGRITY = "integrity"
_DAMAGED = "It is torn or of another format; copy it again from where it came, or save the run again"


def open_here(path: Path, *, verify: bool, max_bytes: int | None) -> xr.DataTree:
    """Open a run in this process, whatever its file may do to it; errors of the libraries pass as they are."""
    suffix = suffix_of(path)
    _CHECKS[suffix](path, max_bytes)
    run, stored_digest = _read(path, suffix)
    try:
        validate(run)
        run.encoding[_INTEGRITY] = _compare(run, stored_digest) if verify else NOT_ASKED
    except BaseException:
        run.close()  # the caller gets no tree that could be closed
        raise
    return run


_CHECKS = {".nc": check_hdf5, ".zarr": check_zarr_folder}
"""What looks at the metadata of a format before an array is read."""


def _known_integrity(path: Path, *, verify: bool, max_bytes: int | None) -> str | None:
    """What is known of a netCDF file before it is opened here; None where that has to be found out."""
    state = compare_file_digest(path)
    if state == "intact":
        return VERIFIED if verify else None
    # The HDF5 library may crash or not end on such a file, and would take this process with it.
    found = open_in_trial(path, verify=verify, max_bytes=max_bytes)
    if state == "changed" and found == WITHOUT_DIGEST:
        raise SchemaError(f"its bytes are not those that were saved. {_DAMAGED}")
    return found


def _read(path: Path, suffix: str) -> tuple[xr.DataTree, Any]:
    """The decoded tree, and the digest that was saved with it."""
    tree = _open_tree(path, suffix)
    try:
        run = tree.map_over_datasets(decode_dataset)
        run.attrs = decode_attrs(tree.attrs)
    except BaseException:
        tree.close()
        raise
    # The decoded tree is a new one, which does not know the open file yet.
    run.set_close(tree.close)
    return run, run.attrs.pop(CONTENT_DIGEST, None)


def _open_tree(path: Path, suffix: str) -> xr.DataTree:
    if suffix == ".nc":
        return xr.open_datatree(path, engine="h5netcdf", **_DECODING)
    return xr.open_datatree(path, **_ZARR, **_DECODING)


def _open_one(path: Path, suffix: str, group: str) -> xr.Dataset:
    if suffix == ".nc":
        return xr.open_dataset(path, engine="h5netcdf", group=group, **_DECODING)
    return xr.open_dataset(path, group=group, **_ZARR, **_DECODING)


# Version 3 by name: a store that also has metadata of version 2 would be read by those, which were not checked.
_ZARR: Any = {"engine": "zarr", "consolidated": False, "zarr_format": 3}


def _compare(run: xr.DataTree, stored: Any) -> str:
    if stored is None:
        # Everything is read nevertheless: a chunk that cannot be read is found now and not in the middle of an analysis.
        content_digest(run)
        return WITHOUT_DIGEST
    if not isinstance(stored, Mapping):
        raise SchemaError(
            f"its {CONTENT_DIGEST} is a {type(stored).__name__}; expected a digest for each variable"
        )
    differences = describe_differences(content_digest(run), stored)
    if differences:
        raise SchemaError(
            f"it is not what was saved ({differences}). It is damaged, or another program has changed it; copy it again, or "
            "open it with open_run(path, verify=False) and save it again"
        )
    return VERIFIED


def unreadable(path: Path, error: Exception) -> str:
    """What an error of a library means for a file, in one line."""
    # The first line: the libraries print the rest of their state below it.
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
    reason = " ".join([reason, *getattr(error, "__notes__", ())])  # such as the variable that was read
    return f"it cannot be read as {suffix_of(path)} ({reason}). {_DAMAGED}"
