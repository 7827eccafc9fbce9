"""How does a run get to disk? It is written completely next to the earlier one, which it then replaces in one step."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope.diagnostics.atomic_writes import replaced_file, replaced_folder
from depthscope.diagnostics.schema.attributes import encode_dataset, with_content_digest
from depthscope.diagnostics.schema.file_digest import write_with_digest
from depthscope.diagnostics.schema.formats import suffix_of
from depthscope.diagnostics.schema.live_store_reading import LIVE
from depthscope.diagnostics.schema.netcdf_image import netcdf_image
from depthscope.diagnostics.schema.replaceable import require_replaceable, require_run
from depthscope.diagnostics.schema.validation import validate


def save_run(run: xr.DataTree, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write a run to one file or store. An earlier run there is replaced in one step, when the new one is complete.

    Whatever happens meanwhile (an error, a full disk, a killed process), the path has the earlier run or the new one. Only a
    run is replaced; of a link, what it points to.

    Parameters
    ----------
    run : DataTree
        A run.
    path : path-like
        Ends in ``.nc`` (netCDF-4) or ``.zarr`` (folder).
    force : bool
        Replace a file that is no run as well: a torn one, one of a newer schema, or of another program. A folder with files
        of others in it is refused all the same.

    Returns
    -------
    Path
        Where it was written.

    Raises
    ------
    SchemaError
        Where the run breaks the contract or the ending is unknown.
    OSError
        Where the path cannot be written to; FileExistsError where what is there is no run.
    MemoryError
        Where there is no room in memory for a ``.nc`` file, which is made there first. ``.zarr`` is written array by array.
    """
    target = Path(path)
    # All are refused before anything is written.
    suffix = suffix_of(target)
    validate(run)
    require_replaceable(target, force=force)
    if LIVE in run.attrs:  # what a store was when it was opened; a copy of it does not grow
        run = run.copy()
        run.attrs = {name: value for name, value in run.attrs.items() if name != LIVE}
    encoded = with_content_digest(run.map_over_datasets(encode_dataset))

    def check(place: Path) -> tuple[Path, ...]:
        require_run(place, suffix, force=force)
        return ()  # no file of others goes along: where there is one, the folder is refused

    replaced = (
        replaced_folder(target, others=check) if suffix == ".zarr" else replaced_file(target, check=check)
    )
    with replaced as fresh:
        _write(encoded, fresh, suffix)
    return target


def _write(run: xr.DataTree, path: Path, suffix: str) -> None:
    """Write an encoded run in one format; every array with a checksum, and none compressed.

    What is stored is what is read: a damaged or hostile file cannot grow on its way into memory. States of float32 would
    lose a tenth of their size by compression.
    """
    if suffix == ".nc":
        write_with_digest(path, netcdf_image(run, _encodings(run, _netcdf_encoding)))
    else:
        _write_zarr(run, path)


def _write_zarr(run: xr.DataTree, folder: Path) -> None:
    # Imported here: most runs are netCDF, and zarr takes a quarter of a second to import.
    from zarr.codecs import Crc32cCodec

    def encoding(variable: xr.Variable) -> dict[str, Any]:
        # Chunks of fill values are written too: one that is missing is known to be lost.
        settings = {"compressors": (Crc32cCodec(),), "write_empty_chunks": True}
        return settings | ({"chunks": _chunk_shape(variable, _ZARR_CHUNK)} if variable.size else {})

    run.to_zarr(folder, consolidated=False, zarr_format=3, encoding=_encodings(run, encoding))


def _netcdf_encoding(variable: xr.Variable) -> dict[str, Any]:
    # A scalar has no chunks, without which HDF5 takes no checksum; the digest of the run is of its value too.
    if not variable.ndim or not variable.size:
        return {}
    # Text as rows of bytes: HDF5 takes no checksum of texts of variable length, and stores them elsewhere in the file.
    if variable.dtype.kind == "O":
        return {"dtype": "S1", "fletcher32": True}
    return {"fletcher32": True, "chunksizes": _chunk_shape(variable, _HDF5_CHUNK)}


# Bytes. HDF5 reads a chunk at a time and keeps 1 MiB of them; of Zarr each is a file.
_HDF5_CHUNK = 1 << 20
_ZARR_CHUNK = 16 << 20


def _chunk_shape(variable: xr.Variable, size: int) -> tuple[int, ...]:
    """Parts of the leading axes, so that the rows that are read together are stored together."""
    shape = list(variable.shape)
    for axis in range(len(shape)):
        inner = variable.dtype.itemsize * math.prod(shape[axis + 1 :])
        shape[axis] = max(1, min(shape[axis], size // inner))
        if shape[axis] > 1:
            break
    return tuple(shape)


def _encodings(
    run: xr.DataTree, encoding: Callable[[xr.Variable], dict[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Path of a group → variable → how it is stored."""
    return {
        node.path: {
            str(name): encoding(variable)
            for name, variable in node.to_dataset(inherit=False).variables.items()
        }
        for node in run.subtree
    }
