"""How does a run get to disk? Complete beside the earlier one, which it then replaces in one step."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import xarray as xr

from depthscope.diagnostics.atomic_writes import replaced_file, replaced_folder
from depthscope.diagnostics.schema.attributes import encode_dataset
from depthscope.diagnostics.schema.formats import suffix_of
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
        Ends in ``.nc`` (netCDF-4), ``.zarr`` (folder) or ``.zarr.zip``.
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
    """
    target = Path(path)
    # All are refused before anything is written.
    suffix = suffix_of(target)
    validate(run)
    require_replaceable(target, force=force)
    encoded = run.map_over_datasets(encode_dataset)

    def check(place: Path) -> tuple[Path, ...]:
        require_run(place, suffix, force=force)
        return ()  # no file of others goes along: where there is one, the folder is refused

    if suffix == ".zarr":
        with replaced_folder(target, others=check) as fresh:
            _write(encoded, fresh, suffix)
    else:
        with replaced_file(target, check=check) as fresh:
            _write(encoded, fresh, suffix)
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
