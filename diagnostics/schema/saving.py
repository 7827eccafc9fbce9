"""How does a run get to disk? Complete beside the earlier one, which it then replaces."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import xarray as xr

from depthscope.diagnostics.schema.attributes import encode_dataset
from depthscope.diagnostics.schema.formats import suffix_of
from depthscope.diagnostics.schema.validation import validate


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
