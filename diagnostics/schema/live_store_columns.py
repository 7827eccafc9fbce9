"""How are many rows stored? As one file of columns, so that one variable of them is read without the others.

A file has a head (magic, the run's id, the file's number, rows and variables), the CRC-32C of each column, and the columns one
after the other: steps, times, and the variables in the order of their declaration. The log names the CRC-32C of all that is
before the columns, so that a file is the one that was written, of this run and at this place, or is refused.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from depthscope.diagnostics.atomic_writes import replaced_file
from depthscope.diagnostics.schema.live_store_files import COLUMNS, open_inside
from depthscope.diagnostics.schema.validation import SchemaError

_HEAD = struct.Struct("<8s16sIII")
MAGIC = b"DScols2\n"
STEP_AND_TIME = 16
"""Bytes of a row before its variables: int64 and float64."""


@dataclass
class OlderRows:
    """The first rows of a file of columns, as the log names it.

    ``size`` rows are in the file, of which the first ``num_rows`` count, from step ``first`` to ``last``. ``checksum`` is the
    CRC-32C of all that is before its columns.
    """

    store: Path
    run: str
    number: int
    size: int
    num_variables: int
    row_bytes: int
    checksum: int
    num_rows: int
    first: int
    last: int

    @property
    def name(self) -> str:
        """Path below the store."""
        return columns_name(self.number)

    @cached_property
    def _start(self) -> int:
        return _HEAD.size + 4 * (2 + self.num_variables)

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return self._start + self.size * (STEP_AND_TIME + self.row_bytes)

    @cached_property
    def _checksums(self) -> np.ndarray:
        """CRC-32C of each column, once the file was found to be the one that the log names."""
        try:
            with open_inside(self.store, self.name) as file:
                num_bytes = os.fstat(file.fileno()).st_size
                begin = file.read(self._start)
        except FileNotFoundError as error:
            raise SchemaError(f"a file of its older rows is missing: {error.filename}") from None
        head = _HEAD.pack(MAGIC, bytes.fromhex(self.run), self.number, self.size, self.num_variables)
        if (
            num_bytes != self.num_bytes
            or google_crc32c.value(begin) != self.checksum
            or begin[: len(head)] != head
        ):
            raise SchemaError(
                f"{self.store / self.name} is not the file that the log of this run names: it is damaged, or of another run; "
                "copy the whole folder again from where it came"
            )
        return np.frombuffer(begin, "<u4", offset=_HEAD.size)

    @cached_property
    def steps(self) -> np.ndarray:
        """Of the rows that count when it is read first."""
        steps = self._read(0, 0, np.dtype("<i8"), ())
        counted = steps[: self.num_rows]
        if (np.diff(steps) <= 0).any() or (counted[0], counted[-1]) != (self.first, self.last):
            raise SchemaError(
                f"{self.store / self.name} has other steps than the log says; nothing of it can be used"
            )
        return steps

    @cached_property
    def times(self) -> np.ndarray:
        """Seconds since 1970 at which the rows were written."""
        return self._read(1, 8, np.dtype("<f8"), ())

    def values(self, place: int, before: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
        """One variable of the rows that count: the one at a place, after so many bytes of others in a row."""
        return self._read(2 + place, STEP_AND_TIME + before, dtype, shape)[: self.num_rows]

    def _read(self, column: int, before: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
        expected = int(self._checksums[column])
        size = self.size * dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        at = self._start + self.size * before
        try:
            with open_inside(self.store, self.name) as file:
                file.seek(at)
                content = file.read(size)
        except FileNotFoundError as error:
            raise SchemaError(f"a file of its older rows is missing: {error.filename}") from None
        if len(content) != size or google_crc32c.value(content) != expected:
            raise SchemaError(
                f"{self.store / self.name}: bytes {at} to {at + size} are damaged; copy the file again from where it came"
            )
        return np.frombuffer(content, dtype).reshape(self.size, *shape)


def columns_name(number: int) -> str:
    """Path of a file of columns below the store."""
    return f"{COLUMNS}/{number:06d}.cols"


def write_columns(
    store: Path, run: str, number: int, size: int, num_variables: int, columns: Iterable[np.ndarray]
) -> int:
    """Write rows as one file, complete or not at all; returns the checksum by which the log names it.

    ``columns`` are the steps, the times and the variables, rows first; one at a time is in memory.
    """
    head = _HEAD.pack(MAGIC, bytes.fromhex(run), number, size, num_variables)
    checksums = []
    with replaced_file(store / columns_name(number)) as fresh, fresh.open("wb") as file:
        file.write(bytes(len(head) + 4 * (2 + num_variables)))
        for values in columns:
            content = np.ascontiguousarray(values).tobytes()
            checksums.append(google_crc32c.value(content))
            file.write(content)
        begin = head + np.array(checksums, "<u4").tobytes()
        file.seek(0)
        file.write(begin)
    return int(google_crc32c.value(begin))
