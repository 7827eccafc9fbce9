"""In which formats is a run on disk? One netCDF file or a zarr folder: the ending of its name decides."""

from __future__ import annotations

from pathlib import Path

from depthscope.diagnostics.schema.validation import SchemaError

SUFFIXES = (".nc", ".zarr")


def suffix_of(path: Path) -> str:
    """Which of `SUFFIXES` a path ends in.

    Raises SchemaError: Where it ends in none of them, or has nothing before the ending.
    """
    if path.name in SUFFIXES:  # a hidden file, which no list of runs shows
        raise SchemaError(f"{path.name!r} is an ending without a name; put one before it")
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return suffix
    if path.name.endswith(".zarr.zip"):
        folder = path.with_suffix("")
        raise SchemaError(
            f"zipped runs are not read or written any more; unpack it, python -m zipfile -e {path.name} {folder.name}, "
            "and name the folder"
        )
    raise SchemaError(
        f"a run has a name that ends in {', '.join(SUFFIXES)}, or it is the folder of a live store; got {path.name!r}"
    )


def without_suffix(name: str) -> str:
    """The name of a run without the ending of its format; that of a live store has none."""
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
