"""How does a run get to disk and back? As one netCDF file, a zarr folder or a zipped one."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope.diagnostics.schema.attributes import decode_attrs, decode_dataset, encode_dataset
from depthscope.diagnostics.schema.validation import SchemaError, validate

SUFFIXES = (".nc", ".zarr", ".zarr.zip")


def save_run(run: xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write a run to one file or store, replacing an earlier one only when the new one is complete.

    Parameters
    ----------
    run : DataTree
        A run.
    path : path-like
        Ends in ``.nc`` (netCDF-4), ``.zarr`` (folder) or ``.zarr.zip``.

    Returns
    -------
    Path
        Where it was written.

    Raises
    ------
    SchemaError
        Where the run breaks the contract or the ending is unknown.
    """
    target = Path(path)
    # Both are refused before anything is written.
    suffix = suffix_of(target)
    validate(run)
    encoded = run.map_over_datasets(encode_dataset)
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the folder of the target, so that the rename at the end stays within one file system and is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        fresh = Path(folder) / target.name
        _write(encoded, fresh, suffix)
        _replace(fresh, target, backup=Path(folder) / "old")
    return target


def open_run(path: str | os.PathLike[str]) -> xr.DataTree:
    """Open a saved run; arrays are read when they are used.

    Parameters
    ----------
    path : path-like
        A ``.nc`` file, a ``.zarr`` folder or a ``.zarr.zip`` file.

    Returns
    -------
    DataTree

    Raises
    ------
    FileNotFoundError
        Where the path does not exist.
    SchemaError
        For a torn, foreign or newer file.
    """
    source = Path(path)
    suffix = suffix_of(source)
    if not source.exists():
        raise FileNotFoundError(
            f"no run at {source}; list the runs of a folder with: depthscope dashboard FOLDER"
        )
    try:
        tree = _read(source, suffix)
    except Exception as error:  # every backend has its own error for a torn file
        raise SchemaError(
            f"{source} cannot be read as {suffix}: {type(error).__name__}: {error}. "
            "It is torn or of another format; save the run again"
        ) from error
    try:
        run = tree.map_over_datasets(decode_dataset)
        run.attrs = decode_attrs(tree.attrs)
        validate(run)
    except SchemaError as error:
        tree.close()  # the caller gets no tree that could be closed
        raise SchemaError(f"{source}: {error}") from None
    # The decoded tree is a new one, which does not know the open file yet.
    run.set_close(tree.close)
    return run


def suffix_of(path: Path) -> str:
    """Which of `SUFFIXES` a path ends in.

    Parameters
    ----------
    path : Path
        Of a run.

    Returns
    -------
    str

    Raises
    ------
    SchemaError
        Where it ends in none of them.
    """
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return suffix
    raise SchemaError(f"a run's name ends in {', '.join(SUFFIXES)}; got {path.name!r}")


def _write(run: xr.DataTree, path: Path, suffix: str) -> None:
    if suffix == ".nc":
        run.to_netcdf(path, engine="h5netcdf")
    elif suffix == ".zarr":
        run.to_zarr(path, consolidated=False)
    else:
        # Zarr writes its metadata twice and a zip cannot be rewritten: write a folder first.
        folder = path.with_name("folder.zarr")
        run.to_zarr(folder, consolidated=False)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # the chunks are compressed already
            for entry in sorted(folder.rglob("*")):
                archive.write(entry, entry.relative_to(folder))
        shutil.rmtree(folder)


def _read(path: Path, suffix: str) -> xr.DataTree:
    if suffix == ".nc":
        return xr.open_datatree(path, engine="h5netcdf")
    if suffix == ".zarr":
        return xr.open_datatree(path, engine="zarr", consolidated=False)
    # Imported here: most runs are netCDF, and zarr takes a quarter of a second to import.
    from zarr.storage import ZipStore

    store: Any = ZipStore(path, mode="r")  # xarray takes a store, but its annotation names paths only
    return xr.open_datatree(store, engine="zarr", consolidated=False)


def _replace(fresh: Path, target: Path, *, backup: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        # A folder cannot be replaced in one call: the old one is moved away until the new one is in place.
        target.rename(backup)
        try:
            fresh.rename(target)
        except OSError:
            backup.rename(target)
            raise
        shutil.rmtree(backup)
    else:
        os.replace(fresh, target)
