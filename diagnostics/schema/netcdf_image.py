"""Where does the HDF5 library write? Into memory that was reserved before: it may crash where a write fails."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import xarray as xr

# Bytes that the library adds: a group or variable takes 4 KiB with its links and the dimensions that it refers to, and its
# attributes as much again as their text. A test compares the reserve with what is used.
_EACH_OBJECT = 16 << 10
_EACH_FILE = 64 << 10

Encodings = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Path of a group → variable → how it is stored."""


def netcdf_image(tree: xr.DataTree, encodings: Encodings) -> memoryview:
    """The bytes of a netCDF-4 file; what is written to a disk is written by Python, whose errors can be handled.

    Raises MemoryError: Where there is no room for the file in memory.
    """
    # Imported here: who only reads needs it later, or not at all.
    import h5netcdf

    groups = {node.path: node.to_dataset(inherit=node is tree).compute() for node in tree.subtree}
    size = _EACH_FILE + sum(_most_bytes(group, encodings.get(path, {})) for path, group in groups.items())
    image = io.BytesIO()
    with h5netcdf.File(image, "w") as file:
        # After the library has looked how long the file is, and before it has anything to lose.
        _reserve(image, size)
        for path, group in groups.items():
            store = xr.backends.H5NetCDFStore(file, group=None if path == "/" else path, mode="a")
            group.dump_to_store(store, encoding=encodings.get(path))
    return image.getbuffer()


def _reserve(image: io.BytesIO, size: int) -> None:
    try:
        image.seek(size)
        image.write(b"\0")
    except MemoryError:
        raise MemoryError(
            f"a netCDF file is made in memory, and there is no room for its {size} bytes; a run whose name ends in .zarr is "
            "written array by array"
        ) from None


def _most_bytes(group: xr.Dataset, encodings: Mapping[str, Mapping[str, Any]]) -> int:
    """No less than a group takes in a file."""
    total = _EACH_OBJECT + _text_bytes(group.attrs)
    for name, variable in group.variables.items():
        total += _EACH_OBJECT + _text_bytes(variable.attrs)
        if variable.dtype.kind == "O":
            # Every text takes as much as the longest one, and chunks of a shape that the library chooses.
            longest = max((len(str(text).encode()) for text in variable.values.flat), default=0)
            total += 4 * variable.size * longest
            continue
        chunks = encodings.get(str(name), {}).get("chunksizes", variable.shape)
        padded = (-(-size // chunk) * chunk for size, chunk in zip(variable.shape, chunks, strict=True))
        # Of each chunk the checksum and the place in the index.
        total += math.prod(padded) * variable.dtype.itemsize * 1001 // 1000
    return total


def _text_bytes(attrs: Mapping[Any, Any]) -> int:
    return sum(2 * len(str(value).encode()) + 1024 for value in attrs.values())
