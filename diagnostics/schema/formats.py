"""In which formats is a run on disk? One netCDF file, a zarr folder or a zipped one: the ending of its name tells."""

from __future__ import annotations

from pathlib import Path

from depthscope.diagnostics.schema.validation import SchemaError

SUFFIXES = (".nc", ".zarr", ".zarr.zip")


def suffix_of(path: Path) -> str:
    """Which of `SUFFIXES` a path ends in.

    Raises SchemaError: Where it ends in none of them, or has nothing before the ending.
    """
    if path.name in SUFFIXES:
        raise SchemaError(f"{path.name!r} is an ending without a name; put one before it")
    for suffix in SUFFIXES:
        # Nothing but an ending is a hidden file, which no list of runs shows.
        if path.name.endswith(suffix) and path.name != suffix:
            return suffix
    raise SchemaError(
        f"a run has a name that ends in {', '.join(SUFFIXES)}, or it is the folder of a live store; got {path.name!r}"
    )
