"""How does a run get from disk? Checked before anything of it is believed; arrays are read when they are used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope.diagnostics.schema.attributes import decode_attrs, decode_dataset
from depthscope.diagnostics.schema.formats import suffix_of
from depthscope.diagnostics.schema.validation import SchemaError, validate


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


def _read(path: Path, suffix: str) -> xr.DataTree:
    if suffix == ".nc":
        return xr.open_datatree(path, engine="h5netcdf")
    if suffix == ".zarr":
        return xr.open_datatree(path, engine="zarr", consolidated=False)
    # Imported here: most runs are netCDF, and zarr takes a quarter of a second to import.
    from zarr.storage import ZipStore

    store: Any = ZipStore(path, mode="r")  # xarray takes a store, but its annotation names paths only
    return xr.open_datatree(store, engine="zarr", consolidated=False)
