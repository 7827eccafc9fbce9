"""How are many rows stored? As one file of columns, so that one variable of them is read without the others.

A file is: 8 bytes of magic, each column contiguous with its rows first, an index in JSON (name, dtype, shape of a row, offset,
bytes and CRC-32C of each column), and a footer with the place and the checksum of the index. It is never changed.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from depthscope.diagnostics.atomic_writes import replaced_file
from depthscope.diagnostics.schema.limits import MAX_TEXT, MAX_VARIABLES
from depthscope.diagnostics.schema.live_store_files import open_inside
from depthscope.diagnostics.schema.validation import SchemaError

MAGIC = b"DScols1\n"
_FOOTER = struct.Struct("<QQI4s")  # offset, bytes and CRC-32C of the index, magic
_END = b"DSce"
DTYPES = ("<f8", "<f4", "<i8")
STEP, TIME = "step", "time"
"""Columns of every file: the steps, and the seconds since 1970 at which each row was written."""


@dataclass(frozen=True)
class Column:
    """Where one variable of a file is.

    Parameters
    ----------
    dtype : str
        One of `DTYPES`.
    shape : tuple of int
        Of one row.
    offset, size, checksum : int
        Bytes before it, its own, and their CRC-32C.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    checksum: int


@dataclass(frozen=True)
class ColumnFile:
    """The index of one file.

    Parameters
    ----------
    path : Path
        The file.
    num_rows : int
        Rows of each column.
    described : mapping of str to object
        What the index says of each column; checked when it is read, since a store may have a hundred thousand of them.
    data_end : int
        Byte before which all columns are.
    """

    path: Path
    num_rows: int
    described: Mapping[str, Any]
    data_end: int

    def column(self, name: str) -> Column | None:
        """Where one column is.

        Parameters
        ----------
        name : str
            Of the variable.

        Returns
        -------
        Column or None
            None where the file does not have it.

        Raises
        ------
        SchemaError
            Where the index says what cannot be.
        """
        fields = self.described.get(name)
        if fields is None:
            return None
        try:
            column = Column(
                fields["dtype"], tuple(fields["shape"]), fields["offset"], fields["bytes"], fields["crc32c"]
            )
            counts = all(map(is_count, (*column.shape, column.offset, column.size)))
            expected = (
                self.num_rows * math.prod(column.shape) * np.dtype(column.dtype).itemsize if counts else None
            )
        except (KeyError, TypeError, ValueError):
            expected = None
        if (
            expected is None
            or column.dtype not in DTYPES
            or column.size != expected
            or column.offset + expected > self.data_end
        ):
            raise SchemaError(f"{self.path}: the column {name!r} is described as {fields!r}, which cannot be")
        return column

    def read(self, name: str) -> np.ndarray | None:
        """Read one column and compare it with its checksum.

        Parameters
        ----------
        name : str
            Of the variable.

        Returns
        -------
        ndarray or None
            Rows first; None where the file does not have it.

        Raises
        ------
        SchemaError
            Where it is not what was written.
        """
        column = self.column(name)
        if column is None:
            return None
        with open_inside(self.path) as file:
            file.seek(column.offset)
            content = file.read(column.size)
        if len(content) != column.size or google_crc32c.value(content) != column.checksum:
            raise SchemaError(
                f"{self.path}: the column {name!r} is damaged (bytes {column.offset} to {column.offset + column.size}); "
                "copy the file again from where it came"
            )
        return np.frombuffer(content, column.dtype).reshape(self.num_rows, *column.shape)


def write_columns(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write rows as one file, whole or not at all.

    Parameters
    ----------
    path : Path
        Does not exist, or is left by a writer that died.
    columns : mapping of str to ndarray
        Rows first, all of the same number, of `DTYPES`; `STEP` is one of them.
    """
    index: dict[str, Any] = {"rows": len(columns[STEP]), "columns": {}}
    with replaced_file(path) as fresh, fresh.open("wb") as file:
        file.write(MAGIC)
        for name, values in columns.items():
            content = np.ascontiguousarray(values).tobytes()
            index["columns"][name] = {
                "dtype": values.dtype.str,
                "shape": values.shape[1:],
                "offset": file.tell(),
                "bytes": len(content),
                "crc32c": google_crc32c.value(content),
            }
            file.write(content)
        text = json.dumps(index).encode()
        offset = file.tell()
        file.write(text + _FOOTER.pack(offset, len(text), google_crc32c.value(text), _END))


def read_index(path: Path) -> ColumnFile:
    """Read where the columns of a file are; no column itself is read.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    ColumnFile

    Raises
    ------
    SchemaError
        Where it is damaged, or says of itself what cannot be.
    """
    with open_inside(path) as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - _FOOTER.size))
        footer = file.read(_FOOTER.size)
        offset, length, checksum, end = (
            _FOOTER.unpack(footer) if len(footer) == _FOOTER.size else (0, 0, 0, b"")
        )
        if end != _END or offset + length + _FOOTER.size != size or length > MAX_TEXT:
            raise SchemaError(f"{path} is no file of columns, or torn; copy it again from where it came")
        file.seek(offset)
        text = file.read(length)
    if google_crc32c.value(text) != checksum:
        raise SchemaError(f"{path}: its index is damaged; copy it again from where it came")
    try:
        return _parsed(path, json.loads(text), offset)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SchemaError(
            f"{path}: its index is none that depthscope writes ({type(error).__name__}: {error})"
        ) from None


def _parsed(path: Path, index: Any, data_end: int) -> ColumnFile:
    num_rows, described = index["rows"], index["columns"]
    if not is_count(num_rows) or len(described) > MAX_VARIABLES:
        raise ValueError(f"{num_rows!r} rows and {len(described)} columns")
    found = ColumnFile(path, num_rows, dict(described), data_end)
    step, time = found.column(STEP), found.column(TIME)
    if step is None or step.dtype != "<i8" or step.shape or time is None or time.dtype != "<f8" or time.shape:
        raise ValueError("the steps are no whole numbers, or the times no numbers")
    return found


def is_count(value: Any) -> bool:
    """Whether a value of a file is a whole number from 0 on that a file can have.

    Parameters
    ----------
    value : object
        Of JSON.

    Returns
    -------
    bool
    """
    return type(value) is int and 0 <= value < 1 << 48
