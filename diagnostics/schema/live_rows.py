"""What is in the row log of a live store? Frames that are only ever appended, each with its length and checksum.

A frame is ``DSr3``, its kind, the bytes of its payload and the CRC-32 of kind, length and payload, then the payload: a NOTE or
LAYOUT is JSON, a ROW a step, a time, how many of the declared variables follow, and their numbers. A row supersedes earlier
rows of its step and of later ones, and so does the note that a training was resumed at a step.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import socket
import struct
import time
import weakref
import zlib
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from depthscope.diagnostics.atomic_writes import open_below
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.schema.attributes import json_default, storable_texts
from depthscope.diagnostics.schema.groups import GROUPS
from depthscope.diagnostics.schema.validation import Limit, SchemaError, require_dense

try:
    import fcntl
except ImportError:  # Windows: a second writer is not noticed there
    fcntl = None  # type: ignore[assignment]

LOG = "rows.log"
FORMAT, VERSION = "depthscope live run", 3
MAGIC = b"DSr3"
NOTE, LAYOUT, ROW = 1, 2, 3
_HEAD = struct.Struct("<4sIII")
ROW_HEAD = struct.Struct("<qdI")
MAX_PAYLOAD, MAX_JSON, PIECE = 256 << 20, 4 << 20, 1 << 20
"""Bytes of a frame, of all JSON of a log (parsed, it takes up to 54 times as much), and of what is read at once."""

KEPT_BYTES = 256 << 20
"""Of the columns that stay in memory, those used last. A heuristic of ours: one metric of 100 000 steps has 24 to 48 MB."""

_NAME = re.compile(rf"({'|'.join(GROUPS)})(/[^/\0]{{1,200}}){{1,2}}")


def packed(kind: int, payload: bytes) -> bytes:
    """One frame."""
    if len(payload) > MAX_PAYLOAD:
        raise InputError(f"a frame of {len(payload)} bytes; expected at most {MAX_PAYLOAD}")
    head = struct.pack("<II", kind, len(payload))
    return _HEAD.pack(MAGIC, kind, len(payload), zlib.crc32(payload, zlib.crc32(head))) + payload


def as_json(content: Mapping[str, Any]) -> bytes:
    """The payload of a note or layout."""
    payload = json.dumps(content, default=json_default).encode()
    if len(payload) > MAX_JSON:
        raise InputError(f"{len(payload)} bytes of attributes and declarations; expected at most {MAX_JSON}")
    return payload


@dataclass(frozen=True)
class Declared:
    """A variable that has one value per step."""

    dims: tuple[str, ...]  # without the step
    shape: tuple[int, ...]  # of one step
    dtype: str  # ``"<f8"`` or ``"<f4"``
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of one step."""
        return math.prod(self.shape) * int(self.dtype[-1])


@dataclass(frozen=True)
class Status:
    """What a live store is at the moment.

    ``state``: ``"growing"``, ``"killed"`` or ``"finished"``; ``"unknown"`` where the writer ran on another machine and holds
    no lock that is seen here.
    ``last_step``, ``num_rows``: of its rows.
    ``age_seconds``: since the last row.
    ``pid``, ``host``: of the last writer.
    ``state_step``: the step of the raw sequences and of the other large arrays.
    ``torn_bytes``: at the end of the log, of a row whose writer died: ignored.
    ``resumed``: of each later attempt the ``step`` at which it went on, and how many rows it ``superseded``.
    """

    state: str
    last_step: int | None
    num_rows: int
    age_seconds: float
    pid: int
    host: str
    state_step: int | None
    torn_bytes: int
    resumed: list[dict[str, int]]

    def as_dict(self) -> dict[str, Any]:
        """The fields, and all of it as a sentence."""
        age = f"{self.age_seconds:.0f} s ago" if math.isfinite(self.age_seconds) else "at an unknown time"
        words = [f"{self.state}: step {self.last_step} is the last of {self.num_rows}, {age}"]
        words.append(f"written by process {self.pid} on {self.host}")
        if self.state_step != self.last_step:
            words.append(f"raw sequences of step {self.state_step}")
        words += [
            f"resumed at step {one['step']} ({one['superseded']} rows superseded)" for one in self.resumed
        ]
        if self.torn_bytes:
            words.append(f"{self.torn_bytes} bytes of a torn row ignored")
        return {**asdict(self), "sentence": ", ".join(words)}


class LiveRows:
    """The rows of a live store that may grow: `refresh` reads the frames that were appended.

    Raises SchemaError: For a log that is damaged before its end, of another program, or of a newer version.
    Raises OSError: Where there is none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._open()
        self._columns: OrderedDict[str, np.ndarray] = OrderedDict()
        self._scanned: io.BufferedReader | None = None
        self._begin()
        try:
            self.refresh()
            if not self.run and self.torn:
                raise SchemaError(f"its {LOG} is damaged at its first byte, or of another program")
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        self.run = self.created = ""
        self.variables: dict[str, Declared] = {}
        self.coords: dict[str, dict[str, Any]] = {}
        self.attrs: dict[str, dict[str, Any]] = {}
        self.attempts: list[dict[str, Any]] = []
        self.resumed: list[dict[str, int]] = []
        self.finished, self._first = False, b""  # the first frame, which differs in every run
        self.end = self.torn = self._num_json = 0
        self._steps, self._times, self._starts, self._counts = array("q"), array("d"), array("q"), array("q")
        self._ends = [0]  # where in a row each variable begins, and the last one ends
        self._columns.clear()

    def _open(self) -> None:
        self._descriptor = open_below(self.path, LOG)
        self.close = weakref.finalize(self, os.close, self._descriptor)

    # --- what there is

    @property
    def steps(self) -> np.ndarray:
        """The step of every row, increasing."""
        return np.array(self._steps, np.int64)

    @property
    def times(self) -> np.ndarray:
        """Seconds since 1970 at which each row was written."""
        return np.array(self._times)

    @property
    def num_rows(self) -> int:
        """Of all steps."""
        return len(self._steps)

    @property
    def last_step(self) -> int | None:
        """Of the last row; None where there is none."""
        return self._steps[-1] if self._steps else None

    def status(self, state_step: int | None = None) -> Status:
        """What the store is now, with the step of its large arrays where they were looked at."""
        writer: dict[str, Any] = (
            self.attempts[-1] if self.attempts else {"pid": 0, "host": "", "time": math.nan}
        )
        here = socket.gethostname() == writer["host"]
        state = "finished" if self.finished else "killed" if here else "unknown"
        is_growing = is_locked(self._descriptor)
        return Status(
            state="growing" if is_growing else state,
            last_step=self.last_step,
            num_rows=self.num_rows,
            age_seconds=max(0.0, time.time() - (self._times[-1] if self._times else writer["time"])),
            pid=writer["pid"],
            host=writer["host"],
            state_step=state_step,
            torn_bytes=0 if is_growing else self.torn,  # what looks torn is being written
            resumed=[dict(one) for one in self.resumed],
        )

    def column(self, name: str) -> np.ndarray:
        """One variable of every row, rows first; NaN in rows that do not have it. It is not to be changed."""
        declared, place = self.variables[name], list(self.variables).index(name)
        known = self._columns.pop(name, np.zeros((0, *declared.shape), declared.dtype))
        added = np.full((self.num_rows - len(known), *declared.shape), math.nan, declared.dtype)
        rows = [at for at in range(len(known), self.num_rows) if self._counts[at] > place]
        if rows and declared.num_bytes:
            before, size = self._ends[place], declared.num_bytes
            content = b"".join([self._read(self._starts[at] + before, size) for at in rows])
            added[np.array(rows) - len(known)] = np.frombuffer(content, declared.dtype).reshape(
                -1, *declared.shape
            )
        self._columns[name] = known = np.concatenate([known, added]) if len(known) else added
        while len(self._columns) > 1 and sum(each.nbytes for each in self._columns.values()) > KEPT_BYTES:
            self._columns.popitem(last=False)
        return known

    def row(self, position: int) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """Dims and values of all variables that one row has."""
        start, count = self._starts[position], self._counts[position]
        data = self._read(start, self._ends[count])
        places = zip(list(self.variables.items())[:count], self._ends, self._ends[1:], strict=False)
        return {
            name: (of.dims, np.frombuffer(data[begin:end], of.dtype).reshape(of.shape))
            for (name, of), begin, end in places
        }

    def _read(self, start: int, size: int) -> bytes:
        if self._scanned is not None:
            self._scanned.seek(start)
            content = self._scanned.read(size)
        elif hasattr(os, "pread"):  # several threads read at once
            content = os.pread(self._descriptor, size, start)
        else:
            os.lseek(self._descriptor, start, os.SEEK_SET)
            content = os.read(self._descriptor, size)
        if len(content) != size:
            raise SchemaError(
                f"its {LOG} became shorter while it was read; copy the folder again from where it came"
            )
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
        # Many small frames at once; a buffer of the last time would have what was torn then.
        self._scanned = io.BufferedReader(io.FileIO(self._descriptor, closefd=False), PIECE)
        try:
            while (frame := self._frame_at(self.end, size)) is not None:
                self._take(*frame)
                self._first = self._first or self._read(0, frame[2])
                self.end = frame[2]
            self.torn = size - self.end
            is_damaged = self.torn > 0 and self._is_damaged(size)
        finally:
            self._scanned.close()
            self._scanned = None
        if is_damaged:
            raise SchemaError(
                f"its {LOG} is damaged at byte {self.end}, in row {self.num_rows}; copy it again from where it came, or keep "
                f"the rows before it: head -c {self.end} {LOG}"
            )
        Limit.of(size, None).check(self.num_rows * self._ends[-1])
        return self.end > before

    def _frame_at(self, at: int, size: int) -> tuple[int, int, int] | None:
        """Kind, start and end of the payload of a complete frame at a byte; None where there is none."""
        if size - at < _HEAD.size:
            return None
        magic, kind, length, checksum = _HEAD.unpack(self._read(at, _HEAD.size))
        start, end = at + _HEAD.size, at + _HEAD.size + length
        if magic != MAGIC or length > MAX_PAYLOAD or end > size:
            return None
        found = zlib.crc32(struct.pack("<II", kind, length))
        for place in range(start, end, PIECE):
            found = zlib.crc32(self._read(place, min(PIECE, end - place)), found)
        return (kind, start, end) if found == checksum else None

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

    def _take(self, kind: int, start: int, end: int) -> None:
        """Take in one frame whose checksum fits."""
        try:
            if kind == ROW:
                self._take_row(start, end)
                return
            self._num_json += end - start
            if kind not in (NOTE, LAYOUT) or self._num_json > MAX_JSON:
                raise InputError(f"a frame of kind {kind}, or more than {MAX_JSON} bytes of JSON")
            content = storable_texts(json.loads(self._read(start, end - start)))
            if kind == LAYOUT:
                self.declare(*self.checked(content))
            else:
                self.take_note(content)
        except SchemaError:
            raise
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
            struct.error,
        ) as error:
            reason = f"{type(error).__name__}: {error}"
            raise SchemaError(f"its {LOG} is none that depthscope writes ({reason})") from None

    def _take_row(self, start: int, end: int) -> None:
        step, when, count = ROW_HEAD.unpack(self._read(start, min(ROW_HEAD.size, end - start)))
        if end - start - ROW_HEAD.size != self._ends[count]:
            raise InputError(f"the row of step {step} has {end - start} bytes for {count} variables")
        if self._steps and step <= self._steps[-1]:
            self._supersede(step)
        self._steps.append(step)
        self._times.append(when)
        self._starts.append(start + ROW_HEAD.size)
        self._counts.append(count)

    def _supersede(self, step: int) -> None:
        """Forget the rows of a step and of later ones."""
        at = bisect_left(self._steps, step)
        for values in (self._steps, self._times, self._starts, self._counts):
            del values[at:]
        for name, column in self._columns.items():
            self._columns[name] = column[:at]

    def take_note(self, content: Mapping[str, Any]) -> None:
        """Take in a note: ``begun``, ``opened``, ``resumed``, ``finished`` or ``attributes``."""
        kind = content["note"]
        if kind == "begun":
            if (content["format"], content["version"]) != (FORMAT, VERSION):
                raise SchemaError(
                    f"its {LOG} has the version {content['version']!r}, this depthscope reads {VERSION}; "
                    "read it with a newer depthscope"
                )
            self.run, self.created = str(content["run"]), str(content["created"])
        elif kind == "opened":
            fields = {"time": float, "pid": int, "host": str}
            self.attempts.append({name: of(content[name]) for name, of in fields.items()})
            self.finished = False
        elif kind == "resumed":
            step, before = int(content["step"]), self.num_rows
            self._supersede(step)
            self.resumed.append({"step": step, "superseded": before - self.num_rows})
        elif kind == "finished":
            self.finished = True
        elif kind == "attributes":
            for path, attrs in content["attrs"].items():
                self.attrs[path] = {**self.attrs.get(path, {}), **attrs}
        else:
            raise InputError(f"a note of the kind {kind!r}")

    def checked(self, content: Mapping[str, Any]) -> tuple[dict[str, Declared], dict[str, dict[str, Any]]]:
        """The variables and coordinates of a layout; refused where they do not fit to one another or to the known ones."""
        variables = {name: _declared(name, fields) for name, fields in content["variables"].items()}
        coords = {name: _coordinate(name, fields) for name, fields in content["coords"].items()}
        shapes = {name: (of.dims, of.shape) for name, of in {**self.variables, **variables}.items()}
        sizes: dict[tuple[str, str], int] = {}
        shapes |= {name: (of["dims"], of["values"].shape) for name, of in coords.items()}
        for name, (dims, shape) in shapes.items():
            group = name.rpartition("/")[0]
            for dim, size in zip(dims, shape, strict=True):
                if sizes.setdefault((group, dim), size) != size:
                    raise InputError(
                        f"{dim} of {name} has {size} labels, expected {sizes[group, dim]} as in /{group}"
                    )
        known = {*self.variables, *self.coords}
        if twice := [
            name for name in [*variables, *coords] if name in known or (name in variables and name in coords)
        ]:
            raise InputError(f"{twice[0]} is declared twice")
        if self._ends[-1] + sum(of.num_bytes for of in variables.values()) > MAX_PAYLOAD:
            raise InputError(f"a row of more than {MAX_PAYLOAD} bytes")
        return variables, coords

    def declare(self, variables: Mapping[str, Declared], coords: Mapping[str, dict[str, Any]]) -> None:
        """Take in variables, which are the last ones of a row from now on, and coordinates."""
        self.coords.update(coords)
        for name, declared in variables.items():
            self.variables[name] = declared
            self._ends.append(self._ends[-1] + declared.num_bytes)


def _declared(name: str, fields: Mapping[str, Any]) -> Declared:
    shape = tuple(fields["shape"])
    if not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
        raise InputError(f"{name} has the shape {shape}, expected whole numbers from 0 on")
    if fields["dtype"] not in ("<f8", "<f4"):
        raise InputError(f"{name} has the dtype {fields['dtype']!r}, expected <f8 or <f4")
    return Declared(_dims(name, fields["dims"], len(shape)), shape, fields["dtype"], dict(fields["attrs"]))


def _coordinate(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    # As objects first: an array of texts takes for each as much as for the longest one.
    values = np.array(fields["values"], dtype=object)
    kinds = {type(value) for value in values.ravel().tolist()}
    if not (kinds <= {int, float} or kinds in ({str}, {bool})):
        raise InputError(f"the values of {name} are of the kinds {kinds}; expected numbers or texts")
    if kinds != {str}:
        values = values.astype(bool if kinds == {bool} else np.int64 if kinds == {int} else np.float64)
    return {
        "dims": _dims(name, fields["dims"], values.ndim),
        "values": values,
        "attrs": dict(fields["attrs"]),
    }


def _dims(name: str, dims: Sequence[str], number: int) -> tuple[str, ...]:
    if not _NAME.fullmatch(name) or name.endswith("/step"):
        raise InputError(f"{name!r} is not a name of a variable in {', '.join(GROUPS)}")
    if (
        not all(isinstance(dim, str) for dim in dims)
        or len(dims) != number
        or len({*dims, "step"}) != number + 1
    ):
        raise InputError(f"{name} has the dims {dims}, expected {number}, each once, without the step")
    return tuple(dims)


def is_live_store(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the folder of a live store, finished or not."""
    try:
        with open(open_below(Path(path), LOG), "rb", buffering=0) as file:
            return file.read(len(MAGIC)) in (MAGIC, b"")  # of one that is just being begun nothing is there
    except OSError:
        return False


def is_being_written(store: Path) -> bool:
    """Whether a process holds the lock of a store; false too where the file system has no locks."""
    try:
        with open(open_below(store, LOG), "rb", buffering=0) as file:
            return is_locked(file.fileno())
    except OSError:
        return False


def is_locked(descriptor: int) -> bool:
    """Whether another one holds the lock of an open log."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
