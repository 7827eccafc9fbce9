"""What is in the row log of a live store? Frames that are only ever appended, each with its lengths and checksum.

A frame is ``DSr4``, the bytes of its head and of its data, the CRC-32 of these lengths, head and data, then the head, which is
JSON, and the data. A head has what is new: the run that was ``begun``, the attempt that was ``opened``, ``attrs`` of groups,
``variables`` with one value per step, ``coords``, and of a row its ``step`` and ``time``: its data are the numbers of the
variables that were declared until then. A row supersedes earlier rows of its step and of later ones.
"""

from __future__ import annotations

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
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

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
FORMAT, VERSION = "depthscope live run", 4
MAGIC = b"DSr4"
HEADS = ("begun", "opened", "attrs", "variables", "coords", "step", "time", "resumed", "finished")
HEAD = struct.Struct("<4sIII")
MAX_DATA, MAX_JSON, PIECE = 256 << 20, 4 << 20, 1 << 20
"""Bytes of a row, of all JSON of a log (parsed, it takes up to 54 times as much), and of what is searched at once."""

KEPT_BYTES = 256 << 20
"""Of the columns that stay in memory. A heuristic of ours: one metric of 100 000 steps has 24 to 48 MB."""

_NAME = re.compile(rf"({'|'.join(GROUPS)})(/[^/\0]{{1,200}}){{1,2}}")


def as_text(head: Mapping[str, Any]) -> bytes:
    """The head of a frame."""
    return json.dumps(head, default=json_default).encode()


def packed(text: bytes, data: bytes = b"") -> bytes:
    """One frame."""
    for size, most in ((len(text), MAX_JSON), (len(data), MAX_DATA)):
        if size > most:
            raise InputError(f"{size} bytes of declarations, or of a row; expected at most {most}")
    checksum = zlib.crc32(data, zlib.crc32(text, zlib.crc32(struct.pack("<II", len(text), len(data)))))
    return HEAD.pack(MAGIC, len(text), len(data), checksum) + text + data


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
        self.coords: dict[str, xr.Variable] = {}
        self.attrs: dict[str, dict[str, Any]] = {}
        self.attempts: list[dict[str, Any]] = []
        self.resumed: list[dict[str, int]] = []
        self.finished, self._first = False, b""  # the first frame, which differs in every run
        self.end = self.torn = self._num_json = 0
        self._steps, self._times, self._starts, self._sizes = array("q"), array("d"), array("q"), array("q")
        self._ends = [0]  # where in a row each variable begins, and the last one ends
        self._columns: dict[str, np.ndarray] = {}

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
        of, begin = self.variables[name], self._ends[list(self.variables).index(name)]
        known = self._columns.pop(name, np.zeros((0, *of.shape), of.dtype))
        added = np.full((self.num_rows - len(known), *of.shape), math.nan, of.dtype)
        rows = [at for at in range(len(known), self.num_rows) if self._sizes[at] >= begin + of.num_bytes]
        if rows and of.num_bytes:
            content = b"".join([self._read(self._starts[at] + begin, of.num_bytes) for at in rows])
            added[np.array(rows) - len(known)] = np.frombuffer(content, of.dtype).reshape(-1, *of.shape)
        known = np.concatenate([known, added]) if len(known) else added
        if sum(each.nbytes for each in self._columns.values()) + known.nbytes > KEPT_BYTES:
            self._columns.clear()
        self._columns[name] = known
        return known

    def _read(self, start: int, size: int) -> bytes:
        if hasattr(os, "pread"):  # several threads read at once
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
        while (frame := self._frame_at(self.end, size)) is not None:
            self.take(*frame)
            self._first = self._first or self._read(0, self.end)
        self.torn = size - self.end
        if self.torn and self._is_damaged(size):
            raise SchemaError(
                f"its {LOG} is damaged at byte {self.end}, in row {self.num_rows}; copy it again from where it came, or keep "
                f"the rows before it: head -c {self.end} {LOG}"
            )
        Limit.of(size, None).check(self.num_rows * self._ends[-1])
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
        if zlib.crc32(content, zlib.crc32(struct.pack("<II", of_head, of_data))) != checksum:
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

    def take(self, head: bytes, start: int, end: int) -> None:
        """Take in one frame whose checksum fits, which ends the log for now."""
        try:
            content = storable_texts(json.loads(head))
            self._num_json += len(head) if set(content) - {"step", "time"} else 0
            if self._num_json > MAX_JSON or (odd := set(content) - set(HEADS)):
                raise InputError(f"more than {MAX_JSON} bytes of JSON, or the unknown {sorted(odd)}")
            self._take(content, start, end - start)
        except SchemaError:
            raise
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            reason = f"{type(error).__name__}: {error}"
            raise SchemaError(f"its {LOG} is none that depthscope writes ({reason})") from None
        self.end = end

    def _take(self, head: Mapping[str, Any], start: int, size: int) -> None:
        if begun := head.get("begun"):
            if (begun["format"], begun["version"]) != (FORMAT, VERSION):
                raise SchemaError(
                    f"its {LOG} has the version {begun['version']!r}, this depthscope reads {VERSION}; "
                    "read it with a newer depthscope"
                )
            self.run, self.created = str(begun["run"]), str(begun["created"])
        if opened := head.get("opened"):
            fields = {"time": float, "pid": int, "host": str}
            self.attempts.append({name: of(opened[name]) for name, of in fields.items()})
        for path, attrs in head.get("attrs", {}).items():
            self.attrs[path] = {**self.attrs.get(path, {}), **attrs}
        variables, coords = self.checked(head)
        self.coords |= coords
        for name, declared in variables.items():
            self.variables[name] = declared
            self._ends.append(self._ends[-1] + declared.num_bytes)
        if "step" in head:
            self._take_row(head, start, size)
        elif size:
            raise InputError(f"{size} bytes of no row")
        self.finished = "finished" in head or (self.finished and "opened" not in head)

    def _take_row(self, head: Mapping[str, Any], start: int, size: int) -> None:
        step, when, before = int(head["step"]), float(head["time"]), self.num_rows
        if self._ends[bisect_right(self._ends, size) - 1] != size:
            raise InputError(f"the row of step {step} has {size} bytes, which are no whole variables")
        at = bisect_left(self._steps, step)
        for values in (self._steps, self._times, self._starts, self._sizes):
            del values[at:]
        if before > at:
            self._columns = {name: column[:at] for name, column in self._columns.items()}
        if head.get("resumed"):
            self.resumed.append({"step": step, "superseded": before - at})
        self._steps.append(step)
        self._times.append(when)
        self._starts.append(start)
        self._sizes.append(size)

    def checked(self, head: Mapping[str, Any]) -> tuple[dict[str, Declared], dict[str, xr.Variable]]:
        """The new variables and coordinates of a head; refused where they do not fit to one another or to the known ones."""
        if "variables" not in head and "coords" not in head:
            return {}, {}
        variables = {name: _declared(name, fields) for name, fields in head.get("variables", {}).items()}
        coords = {name: _coordinate(name, fields) for name, fields in head.get("coords", {}).items()}
        names = [*self.variables, *self.coords, *variables, *coords]
        if odd := [name for name in names if not _NAME.fullmatch(name) or name.endswith("/step")]:
            raise InputError(f"{odd[0]!r} is not a name of a variable in {', '.join(GROUPS)}")
        if twice := [name for name, number in Counter(names).items() if number > 1]:
            raise InputError(f"{twice[0]} is declared twice")
        groups: dict[str, dict[str, Any]] = {}
        for name, of in (self.variables | variables).items():
            group, _, label = name.rpartition("/")
            nothing = np.broadcast_to(0.0, (1, *of.shape))
            groups.setdefault(group, {})[label] = xr.Variable(("step", *of.dims), nothing)
        for name, coord in (self.coords | coords).items():
            group, _, label = name.rpartition("/")
            groups.setdefault(group, {})[label] = coord
        for group in groups.values():
            xr.Dataset(group)  # refuses a dim of two sizes
        if self._ends[-1] + sum(of.num_bytes for of in variables.values()) > MAX_DATA:
            raise InputError(f"a row of more than {MAX_DATA} bytes")
        return variables, coords


def _declared(name: str, fields: Mapping[str, Any]) -> Declared:
    shape = tuple(fields["shape"])
    if not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
        raise InputError(f"{name} has the shape {shape}, expected whole numbers from 0 on")
    if fields["dtype"] not in ("<f8", "<f4"):
        raise InputError(f"{name} has the dtype {fields['dtype']!r}, expected <f8 or <f4")
    return Declared(_dims(name, fields), shape, fields["dtype"], dict(fields["attrs"]))


def _coordinate(name: str, fields: Mapping[str, Any]) -> xr.Variable:
    # As objects first: an array of texts takes for each as much as for the longest one.
    values = np.array(fields["values"], dtype=object)
    kinds = {type(value) for value in values.ravel().tolist()}
    if not (kinds <= {int, float} or kinds in ({str}, {bool})):
        raise InputError(f"the values of {name} are of the kinds {kinds}; expected numbers or texts")
    if kinds != {str}:
        values = values.astype(bool if kinds == {bool} else np.int64 if kinds == {int} else np.float64)
    return xr.Variable(_dims(name, fields), values, dict(fields["attrs"]))


def _dims(name: str, fields: Mapping[str, Any]) -> tuple[str, ...]:
    dims = tuple(map(str, fields["dims"]))
    if len({*dims, "step"}) <= len(dims):
        raise InputError(f"{name} has the dims {dims}, expected each once, without the step")
    return dims


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
