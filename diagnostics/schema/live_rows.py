"""How is a history kept, in memory and in the log of a live store? Declared variables, and the numbers of each step.

The log is frames that are only appended, each by one call of the system: ``DSr4``, the bytes of its head and of its data, the
CRC-32 of these lengths, head and data, then the head, which is JSON, and the data. A head has what is new: the run that was
``begun``, the attempt that was ``opened``, ``variables`` with one value per step, ``coords``, ``findings`` by step, and of a
row its ``step`` and ``time``: its data are the numbers of the variables that were declared until then. A row supersedes
earlier rows of its step and of later ones, and their findings. A writer that is killed leaves complete frames and perhaps
the beginning of one, which is ignored and overwritten.
"""

from __future__ import annotations

import json
import math
import operator
import os
import re
import socket
import struct
import time
import weakref
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from depthscope.diagnostics.atomic_writes import open_below
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.schema.attributes import json_default, storable_texts
from depthscope.diagnostics.schema.groups import GROUPS
from depthscope.diagnostics.schema.validation import SchemaError, require_dense, require_room

try:
    import fcntl
except ImportError:  # Windows: a second writer is not noticed there
    fcntl = None  # type: ignore[assignment]

LOG = "rows.log"
FORMAT, VERSION, MAGIC = "depthscope live run", 4, b"DSr4"
# ``attrs``: of earlier versions, which noted there what the saved arrays have too.
HEADS = {"begun", "opened", "attrs", "variables", "coords", "step", "time", "resumed", "findings", "finished"}
HEAD, LENGTHS = struct.Struct("<4sIII"), struct.Struct("<II")
MAX_DATA, MAX_JSON, PIECE = 256 << 20, 4 << 20, 1 << 20
"""Bytes of a row, of all JSON of a log (parsed, it takes up to 54 times as much), and of what is searched at once."""

FINDINGS = "findings"
"""Attribute of a run by step: its findings where they were new or more severe, each with the step that showed it."""

KEPT_BYTES = 256 << 20
"""Of the columns that stay in memory. A heuristic of ours: one metric of 100 000 steps has 24 to 48 MB."""

_NAME = re.compile(rf"({'|'.join(GROUPS)})(/[^/\0]{{1,200}}){{1,2}}")

Numbers = Mapping[str, Any]
"""Values by ``group/variable`` or ``group/chain/variable``: an array, or ``(dims, array)`` or ``(dims, array, attrs)``."""


class Declared(NamedTuple):
    """A variable that has one value per step."""

    dims: tuple[str, ...]  # without the step
    shape: tuple[int, ...]  # of one step
    dtype: str  # ``"<f8"`` or ``"<f4"``
    attrs: dict[str, Any]
    begin: int  # in the data of a row

    @property
    def num_bytes(self) -> int:
        """Of one step."""
        return math.prod(self.shape) * int(self.dtype[-1])

    def is_in(self, row: Row) -> bool:
        """Whether a row has numbers of it."""
        return row.size >= self.begin + self.num_bytes > self.begin


class Row(NamedTuple):
    """Where in the log one step is, and when it was written."""

    step: int
    time: float
    start: int
    size: int


class StepRows:
    """What has a value per step: declared variables and coordinates, and where the numbers of each row are."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.variables: dict[str, Declared] = {}
        self.coords: dict[str, xr.Variable] = {}
        self.rows: list[Row] = []
        self.findings: list[dict[str, Any]] = []
        self._row_bytes = 0
        self._columns: dict[str, np.ndarray] = {}

    @property
    def steps(self) -> np.ndarray:
        """The step of every row, increasing."""
        return np.array([row.step for row in self.rows], np.int64)

    @property
    def times(self) -> np.ndarray:
        """Seconds since 1970 at which each row was written."""
        return np.array([row.time for row in self.rows])

    @property
    def last_step(self) -> int | None:
        """Of the last row; None where there is none."""
        return self.rows[-1].step if self.rows else None

    def column(self, name: str) -> np.ndarray:
        """One variable of every row, rows first; NaN in rows that do not have it. It is not to be changed."""
        of = self.variables[name]
        known = self._columns.pop(name, np.zeros((0, *of.shape), of.dtype))
        new = self.rows[len(known) :]
        added = np.full((len(new), *of.shape), math.nan, of.dtype)
        has = np.array([of.is_in(row) for row in new], bool)
        if content := [self._read(row.start + of.begin, of.num_bytes) for row in new if of.is_in(row)]:
            added[has] = np.frombuffer(b"".join(content), of.dtype).reshape(-1, *of.shape)
        known = np.concatenate([known, added]) if len(known) else added
        if sum(each.nbytes for each in self._columns.values()) + known.nbytes > KEPT_BYTES:
            self._columns.clear()
        self._columns[name] = known
        return known

    def dataset(self, path: str, known: xr.Dataset) -> xr.Dataset:
        """A group in which what has a step is of the rows, read when it is used, and the rest as it is known."""
        kept = known.drop_dims("step") if "step" in known.dims else known
        of_group = {name.rpartition("/")[2]: name for name in self.coords if name.rpartition("/")[0] == path}
        coords = {label: self.coords[name] for label, name in of_group.items() if label not in kept.variables}
        variables = {}
        for name, declared in self.variables.items():
            group, _, label = name.rpartition("/")
            if group == path:
                attrs = known[label].attrs if label in known.variables else dict(declared.attrs)
                lazy = indexing.LazilyIndexedArray(_Column(self, name))
                variables[label] = xr.Variable(("step", *declared.dims), lazy, attrs)
        try:
            return kept.assign_coords({"step": ("step", self.steps), **coords}).assign(variables)
        except ValueError as error:  # other labels than the saved arrays, or two things of one name
            raise SchemaError(f"the rows of /{path} do not fit to its saved arrays ({error})") from None

    def groups_of(self, state: xr.DataTree) -> dict[str, xr.Dataset]:
        """Every group of a run by its path, from these rows and the arrays of one step."""
        groups = {node.path.strip("/"): node.to_dataset(inherit=False) for node in state.subtree}
        for path in dict.fromkeys(name.rpartition("/")[0] for name in (*self.variables, *self.coords)):
            groups[path] = self.dataset(path, groups.get(path, xr.Dataset()))
        if self.findings:
            groups[""].attrs[FINDINGS] = list(self.findings)
        return groups

    def _read(self, start: int, size: int) -> bytes:
        raise NotImplementedError

    # --- adding

    def encoded(self, step: int, numbers: Numbers, coords: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        """The head and the data of a row, see `LiveStore.append`; what is new is declared in the head."""
        head: dict[str, Any] = {"variables": {}, "coords": {}}
        for name in [name for name in numbers if name not in self.variables]:
            if not isinstance(numbers[name], tuple):
                raise InputError(f"{name} is new and has no dims; give (dims, array)")
            dims, values, *attrs = numbers[name]
            array = np.asarray(values)
            dtype = "<f4" if array.dtype == np.float32 else "<f8"
            fields = {"shape": list(array.shape), "dtype": dtype, "attrs": dict(*attrs)}
            head["variables"][name] = {"dims": _listed(dims), **fields}
        for name in [name for name in coords if name not in self.coords]:
            dims, values, *attrs = coords[name]
            fields = {"values": np.asarray(values).tolist(), "attrs": dict(*attrs)}
            head["coords"][name] = {"dims": _listed(dims), **fields}
        head = {key: of for key, of in head.items() if of}
        every = {**self.variables, **self.checked(head)[0]}
        data = b"".join([_row_part(name, numbers.get(name), of) for name, of in every.items()])
        return {**head, "step": int(step), "time": time.time()}, data

    def _take(self, head: Mapping[str, Any], start: int, size: int) -> None:
        """Take in one head, and where its data are."""
        variables, coords, self._row_bytes = self.checked(head)
        self.variables |= variables
        self.coords |= coords
        for found in head.get(FINDINGS, ()):
            self.findings.append({**found, "step": operator.index(found["step"])})
        if "step" not in head:
            if size:
                raise InputError(f"{size} bytes of no row")
            return
        row = Row(int(head["step"]), float(head["time"]), start, size)
        if size not in {0, *(of.begin + of.num_bytes for of in self.variables.values())}:
            raise InputError(f"the row of step {row.step} has {size} bytes, which are no whole variables")
        before = len(self.rows)
        while self.rows and self.rows[-1].step >= row.step:
            self.rows.pop()
        if len(self.rows) < before:
            self._columns = {name: of[: len(self.rows)] for name, of in self._columns.items()}
            self.findings[:] = [found for found in self.findings if found["step"] < row.step]
        self.rows.append(row)

    def checked(self, head: Mapping[str, Any]) -> tuple[dict[str, Declared], dict[str, xr.Variable], int]:
        """The new variables and coordinates of a head, and the bytes of a row with them.

        Refused where they do not fit to one another or to the known ones.
        """
        variables: dict[str, Declared] = {}
        end = self._row_bytes
        for name, fields in head.get("variables", {}).items():
            variables[name] = _declared(name, fields, end)
            end += variables[name].num_bytes
        coords = {name: _coordinate(name, fields) for name, fields in head.get("coords", {}).items()}
        if not variables and not coords:
            return variables, coords, end
        if twice := (variables.keys() & coords) | ({*variables, *coords} & {*self.variables, *self.coords}):
            raise InputError(f"{min(twice)} is declared twice")
        _require_fitting({**self.variables, **self.coords, **variables, **coords})
        if end > MAX_DATA:
            raise InputError(f"a row of more than {MAX_DATA} bytes")
        return variables, coords, end


class MemoryRows(StepRows):
    """The rows of a recorder, which take little more than their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes = bytearray()

    def _read(self, start: int, size: int) -> bytes:
        return bytes(self._bytes[start : start + size])

    def append(self, step: int, numbers: Numbers, coords: Mapping[str, Any]) -> None:
        """Add the row of one step, as `LiveStore.append` does."""
        head, data = self.encoded(step, numbers, coords)
        self._take(head, len(self._bytes), len(data))
        self._bytes += data

    def row(self, number: int) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """The arguments of `append` for one row."""
        row = self.rows[number]
        numbers = {
            name: (
                of.dims,
                np.ndarray(of.shape, of.dtype, self._read(row.start + of.begin, of.num_bytes)),
                of.attrs,
            )
            for name, of in self.variables.items()
            if of.is_in(row)
        }
        return row.step, numbers, {name: (of.dims, of.values, of.attrs) for name, of in self.coords.items()}


class _Column(BackendArray):
    """One variable of the rows that there are now, read completely when a part of it is used."""

    def __init__(self, rows: StepRows, name: str) -> None:
        declared = rows.variables[name]
        self.shape, self.dtype = (len(rows.rows), *declared.shape), np.dtype(declared.dtype)
        self._read = partial(rows.column, name)

    def __deepcopy__(self, memo: Any) -> _Column:
        return self  # what was written is never changed

    def __getitem__(self, key: Any) -> Any:
        return indexing.explicit_indexing_adapter(
            key,
            self.shape,
            indexing.IndexingSupport.BASIC,
            lambda index: self._read()[: self.shape[0]][index].copy(),
        )


def _require_fitting(declared: Mapping[str, Declared | xr.Variable]) -> None:
    """Refuse names that a run does not have, and a dim of two sizes within a group."""
    groups: dict[str, dict[str, Any]] = {}
    for name, of in declared.items():
        if not _NAME.fullmatch(name) or name.endswith("/step"):
            raise InputError(f"{name!r} is not a name of a variable in {', '.join(GROUPS)}")
        group, _, label = name.rpartition("/")
        groups.setdefault(group, {})[label] = (
            (("step", *of.dims), np.broadcast_to(0.0, (1, *of.shape))) if isinstance(of, Declared) else of
        )
    for variables in groups.values():
        xr.Dataset(variables)  # refuses a dim of two sizes


def _declared(name: str, fields: Mapping[str, Any], begin: int) -> Declared:
    dims, shape, dtype = tuple(map(str, fields["dims"])), tuple(fields["shape"]), fields["dtype"]
    is_shape = all(type(size) is int and 0 <= size < 1 << 40 for size in shape)
    if not is_shape or dtype not in ("<f8", "<f4") or len({*dims, "step"}) <= len(dims):
        raise InputError(
            f"{name} has the dims {dims}, the shape {shape} and the dtype {dtype!r}; expected each dim once and no step, "
            "whole numbers from 0 on, and <f8 or <f4"
        )
    return Declared(dims, shape, dtype, dict(fields["attrs"]), begin)


def _coordinate(name: str, fields: Mapping[str, Any]) -> xr.Variable:
    # As objects first: an array of texts takes for each as much as for the longest one.
    values = np.array(fields["values"], dtype=object)
    kinds = {type(value) for value in values.ravel().tolist()}
    if not (kinds <= {int, float} or kinds in ({str}, {bool})):
        raise InputError(f"the values of {name} are of the kinds {kinds}; expected numbers or texts")
    if kinds != {str}:
        values = values.astype(bool if kinds == {bool} else np.int64 if kinds == {int} else np.float64)
    return xr.Variable(fields["dims"], values, dict(fields["attrs"]))


def _listed(dims: str | list[str]) -> list[str]:
    return [dims] if isinstance(dims, str) else list(dims)


def _row_part(name: str, given: Any, declared: Declared) -> bytes:
    """The bytes of one variable in a row; NaN where it was not measured."""
    if given is None:
        return np.full(declared.shape, math.nan, declared.dtype).tobytes()
    array = np.asarray(given[1] if isinstance(given, tuple) else given, declared.dtype)
    if array.shape != declared.shape:
        raise InputError(
            f"{name} has the shape {array.shape}, expected {declared.shape} as in the rows before; "
            "a changed model needs a store of its own"
        )
    return array.tobytes()


# --- on disk


@dataclass(frozen=True)
class Status:
    """What a live store is at the moment.

    ``state``: ``"growing"``, ``"killed"`` or ``"finished"``; ``"unknown"`` where the writer ran on another machine and holds
    no lock that is seen here.
    """

    state: str
    last_step: int | None
    num_rows: int
    age_seconds: float  # since the last row
    pid: int  # of the last writer
    host: str
    state_step: int | None  # of the raw sequences and of the other large arrays

    def as_dict(self) -> dict[str, Any]:
        """The fields, and all of it as a sentence."""
        age = f"{self.age_seconds:.0f} s ago" if math.isfinite(self.age_seconds) else "at an unknown time"
        words = f"{self.state}: step {self.last_step} is the last of {self.num_rows}, {age}, written by process {self.pid}"
        words += f" on {self.host}"
        if self.state_step != self.last_step:
            words += f", raw sequences of step {self.state_step}"
        return {**asdict(self), "sentence": words}


def packed(head: Mapping[str, Any], data: bytes = b"") -> bytes:
    """One frame."""
    text = json.dumps(head, default=json_default).encode()
    if len(text) > MAX_JSON or len(data) > MAX_DATA:
        raise InputError(f"a row of more than {MAX_DATA} bytes, or more than {MAX_JSON} of declarations")
    checksum = zlib.crc32(data, zlib.crc32(text, zlib.crc32(LENGTHS.pack(len(text), len(data)))))
    return HEAD.pack(MAGIC, len(text), len(data), checksum) + text + data


class LiveRows(StepRows):
    """The rows of a live store that may grow: `refresh` reads the frames that were appended.

    Raises SchemaError: For a log that is damaged before its end, of another program, or of a newer version.
    Raises OSError: Where there is none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._open()
        try:
            self.refresh()
            if not self.run and self.torn:
                raise SchemaError(f"its {LOG} is damaged at its first byte, or of another program")
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._descriptor = open_below(self.path, LOG)
        self.close = weakref.finalize(self, os.close, self._descriptor)
        self._begin()

    def _begin(self) -> None:
        super()._begin()
        self.run = self.created = ""
        self.writer: dict[str, Any] = {"pid": 0, "host": "", "time": math.nan}
        self.resumed: list[int] = []  # the steps at which a later attempt went on
        self.finished, self._first = False, b""  # the first frame, which differs in every run
        self.end = self.torn = self._num_json = 0

    def status(self, state_step: int | None = None) -> Status:
        """What the store is now, with the step of its large arrays where they were looked at."""
        is_here = socket.gethostname() == self.writer["host"]
        state = "finished" if self.finished else "killed" if is_here else "unknown"
        return Status(
            state="growing" if is_locked(self._descriptor) else state,
            last_step=self.last_step,
            num_rows=len(self.rows),
            age_seconds=max(0.0, time.time() - (self.rows[-1].time if self.rows else self.writer["time"])),
            pid=self.writer["pid"],
            host=self.writer["host"],
            state_step=state_step,
        )

    def _read(self, start: int, size: int) -> bytes:
        if hasattr(os, "pread"):  # several threads read at once
            content = os.pread(self._descriptor, size, start)
        else:
            os.lseek(self._descriptor, start, os.SEEK_SET)
            content = os.read(self._descriptor, size)
        if len(content) != size:
            raise SchemaError(f"its {LOG} became shorter while it was read; copy it again from where it came")
        return content

    # --- replaying

    def refresh(self) -> bool:
        """Read what was appended since the last time; a log that was begun anew is read from its beginning."""
        if not os.path.samestat(os.fstat(self._descriptor), os.lstat(self.path / LOG)):
            self.close()
            self._open()
        entry = os.fstat(self._descriptor)
        require_dense(self.path / LOG, entry)
        if entry.st_size < self.end or self._read(0, len(self._first)) != self._first:
            self._begin()
        before, size = self.end, entry.st_size
        while (frame := self._frame_at(self.end, size)) is not None:
            self.take(*frame)
            self._first = self._first or self._read(0, self.end)
        self.torn = size - self.end
        if self.torn and self._is_damaged(size):
            raise SchemaError(
                f"its {LOG} is damaged at byte {self.end}, in row {len(self.rows)}; copy it again from where it came, or keep "
                f"the rows before it: head -c {self.end} {LOG}"
            )
        require_room(len(self.rows) * self._row_bytes, size)
        return self.end > before

    def _frame_at(self, at: int, size: int) -> tuple[bytes, int, int] | None:
        """The head of a complete frame at a byte, and the start and end of its data; None where there is none."""
        if size - at < HEAD.size:
            return None
        magic, of_head, of_data, checksum = HEAD.unpack(self._read(at, HEAD.size))
        start = at + HEAD.size
        if magic != MAGIC or of_head > MAX_JSON or of_data > MAX_DATA or start + of_head + of_data > size:
            return None
        content = self._read(start, of_head + of_data)
        if zlib.crc32(content, zlib.crc32(LENGTHS.pack(of_head, of_data))) != checksum:
            return None
        return content[:of_head], start + of_head, start + of_head + of_data

    def _is_damaged(self, size: int) -> bool:
        """Whether a complete frame follows anywhere after the frames of the log: else what follows is torn."""
        tried, at = 0, self.end
        while at < size:
            content = self._read(at, min(PIECE, size - at))
            for found in re.finditer(re.escape(MAGIC), content):
                if self._frame_at(at + found.start(), size) is not None or (tried := tried + 1) > 100:
                    return True  # no torn frame is full of magic numbers
            at += max(1, len(content) - len(MAGIC) + 1) if at + len(content) < size else len(content)
        return False

    def require_room(self, head: Mapping[str, Any], size: int) -> int:
        """The bytes of all JSON but that of plain rows, with one more head; refused above the limit."""
        total = self._num_json + (size if {*head} - {"step", "time"} else 0)
        if total > MAX_JSON:
            raise InputError(f"more than {MAX_JSON} bytes of declarations in one log")
        return total

    def take(self, head: bytes, start: int, end: int) -> None:
        """Take in one frame whose checksum fits, which ends the log for now."""
        try:
            content = storable_texts(json.loads(head))
            if odd := {*content} - HEADS:
                raise InputError(f"the unknown {sorted(odd)}")
            self._num_json = self.require_room(content, len(head))
            self._take(content, start, end - start)
        except SchemaError:
            raise
        except Exception as error:  # a foreign log may have anything in its frames
            reason = f"{type(error).__name__}: {error}"
            raise SchemaError(f"its {LOG} is none that depthscope writes ({reason})") from None
        self.end = end

    def _take(self, head: Mapping[str, Any], start: int, size: int) -> None:
        if begun := head.get("begun"):
            if (begun["format"], begun["version"]) != (FORMAT, VERSION):
                raise SchemaError(
                    f"its {LOG} has the version {begun['version']!r}, this depthscope reads {VERSION}; "
                    "read it with the depthscope that wrote it"
                )
            self.run, self.created = str(begun["run"]), str(begun["created"])
        if opened := head.get("opened"):
            fields = {"time": float, "pid": int, "host": str}
            self.writer = {name: of(opened[name]) for name, of in fields.items()}
        super()._take(head, start, size)
        self.resumed += [int(head["step"])] if head.get("resumed") else []
        self.finished = "finished" in head or (self.finished and "opened" not in head)


def is_locked(descriptor: int) -> bool:
    """Whether another one holds the lock of an open log."""
    with suppress(OSError):  # a file system without locks
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            except BlockingIOError:
                return True
    return False
