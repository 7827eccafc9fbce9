"""How does a run get to disk while it is measured, and back? Row by row, into a log that survives its writer.

The log is frames that are only appended, each by one call of the system: ``DSr4``, the bytes of its head and of its data, the
CRC-32 of these lengths, head and data, then the head, which is JSON, and the data. A head has what is new: the run that was
``begun``, the attempt that was ``opened``, ``attrs`` of groups, ``variables`` with one value per step, ``coords``, and of a
row its ``step`` and ``time``: its data are the numbers of the variables that were declared until then. A row supersedes
earlier rows of its step and of later ones. A writer that is killed leaves complete frames and perhaps the beginning of one,
which is ignored and overwritten. Large arrays are in runs of one step in ``states``, each written by `save_run`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import socket
import struct
import time
import uuid
import weakref
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from depthscope.diagnostics.atomic_writes import (
    NO_LOCKS,
    kind_of,
    made_folder,
    open_below,
    remove_below,
    require_writable,
)
from depthscope.diagnostics.errors import AbsentError, BusyError, InputError, StorageError, TakenError
from depthscope.diagnostics.schema.attributes import json_default, storable_texts
from depthscope.diagnostics.schema.groups import GROUPS
from depthscope.diagnostics.schema.saving import save_run
from depthscope.diagnostics.schema.validation import Limit, SchemaError, require_dense

try:
    import fcntl
except ImportError:  # Windows: a second writer is not noticed there
    fcntl = None  # type: ignore[assignment]

LOG, STATES = "rows.log", "states"
FORMAT, VERSION, MAGIC = "depthscope live run", 4, b"DSr4"
HEADS = {"begun", "opened", "attrs", "variables", "coords", "step", "time", "resumed", "finished"}
HEAD, LENGTHS = struct.Struct("<4sIII"), struct.Struct("<II")
MAX_DATA, MAX_JSON, PIECE = 256 << 20, 4 << 20, 1 << 20
"""Bytes of a row, of all JSON of a log (parsed, it takes up to 54 times as much), and of what is searched at once."""

KEPT_BYTES = 256 << 20
"""Of the columns that stay in memory. A heuristic of ours: one metric of 100 000 steps has 24 to 48 MB."""

RUN_ID = "live_run"
"""Attribute of the runs with the arrays of one step: the id of the run that the store is of."""

_NAME = re.compile(rf"({'|'.join(GROUPS)})(/[^/\0]{{1,200}}){{1,2}}")
_STATE = re.compile(r"\d{6,9}\.zarr\.zip")

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


class Row(NamedTuple):
    """Where in the log one step is, and when it was written."""

    step: int
    time: float
    start: int
    size: int


@dataclass(frozen=True)
class Status:
    """What a live store is at the moment.

    ``state``: ``"growing"``, ``"killed"`` or ``"finished"``; ``"unknown"`` where the writer ran on another machine and holds
    no lock that is seen here.
    ``age_seconds``: since the last row. ``pid``, ``host``: of the last writer.
    ``state_step``: the step of the raw sequences and of the other large arrays.
    """

    state: str
    last_step: int | None
    num_rows: int
    age_seconds: float
    pid: int
    host: str
    state_step: int | None

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


class LiveRows:
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
        self.run = self.created = ""
        self.variables: dict[str, Declared] = {}
        self.coords: dict[str, xr.Variable] = {}
        self.attrs: dict[str, dict[str, Any]] = {}
        self.writer: dict[str, Any] = {"pid": 0, "host": "", "time": math.nan}
        self.resumed: list[int] = []  # the steps at which a later attempt went on
        self.rows: list[Row] = []
        self.finished, self._first = False, b""  # the first frame, which differs in every run
        self.end = self.torn = self._num_json = self._row_bytes = 0
        self._columns: dict[str, np.ndarray] = {}

    # --- what there is

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

    def column(self, name: str) -> np.ndarray:
        """One variable of every row, rows first; NaN in rows that do not have it. It is not to be changed."""
        of = self.variables[name]
        known = self._columns.pop(name, np.zeros((0, *of.shape), of.dtype))
        new = self.rows[len(known) :]
        added = np.full((len(new), *of.shape), math.nan, of.dtype)
        has = [row.size >= of.begin + of.num_bytes > of.begin for row in new]
        content = [
            self._read(row.start + of.begin, of.num_bytes)
            for row, is_in in zip(new, has, strict=True)
            if is_in
        ]
        if content:
            added[np.array(has)] = np.frombuffer(b"".join(content), of.dtype).reshape(-1, *of.shape)
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
        Limit.of(size, None).check(len(self.rows) * self._row_bytes)
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

    def take(self, head: bytes, start: int, end: int) -> None:
        """Take in one frame whose checksum fits, which ends the log for now."""
        try:
            content = storable_texts(json.loads(head))
            self._num_json += len(head) if {*content} - {"step", "time"} else 0
            if self._num_json > MAX_JSON or (odd := {*content} - HEADS):
                raise InputError(f"more than {MAX_JSON} bytes of JSON, or the unknown {sorted(odd)}")
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
                    "read it with a newer depthscope"
                )
            self.run, self.created = str(begun["run"]), str(begun["created"])
        if opened := head.get("opened"):
            fields = {"time": float, "pid": int, "host": str}
            self.writer = {name: of(opened[name]) for name, of in fields.items()}
        for path, attrs in head.get("attrs", {}).items():
            self.attrs[path] = {**self.attrs.get(path, {}), **attrs}
        variables, coords, self._row_bytes = self.checked(head)
        self.variables |= variables
        self.coords |= coords
        if "step" in head:
            self._take_row(head, start, size)
        elif size:
            raise InputError(f"{size} bytes of no row")
        self.finished = "finished" in head or (self.finished and "opened" not in head)

    def _take_row(self, head: Mapping[str, Any], start: int, size: int) -> None:
        row = Row(int(head["step"]), float(head["time"]), start, size)
        if size not in {0, *(of.begin + of.num_bytes for of in self.variables.values())}:
            raise InputError(f"the row of step {row.step} has {size} bytes, which are no whole variables")
        before = len(self.rows)
        while self.rows and self.rows[-1].step >= row.step:
            self.rows.pop()
        if len(self.rows) < before:
            self._columns = {name: of[: len(self.rows)] for name, of in self._columns.items()}
        self.resumed += [row.step] if head.get("resumed") else []
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
    shape = tuple(fields["shape"])
    if not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
        raise InputError(f"{name} has the shape {shape}, expected whole numbers from 0 on")
    if fields["dtype"] not in ("<f8", "<f4"):
        raise InputError(f"{name} has the dtype {fields['dtype']!r}, expected <f8 or <f4")
    return Declared(_dims(name, fields), shape, fields["dtype"], dict(fields["attrs"]), begin)


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


# --- the folder


def live_log_of(path: Path) -> Path:
    """The live store next to a file that is written when the training ends; it is there as long as the file is not."""
    return path.with_name(f"{path.name}.live")


def states_of(store: Path) -> list[str]:
    """The runs with the arrays of one step, oldest first, by their paths below the store; links are none."""
    if not (store / STATES).is_dir() or (store / STATES).is_symlink():
        return []
    with os.scandir(store / STATES) as entries:
        names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    return [f"{STATES}/{name}" for name in sorted(filter(_STATE.fullmatch, names), key=_number)]


def _number(name: str) -> int:
    return int(Path(name).name.partition(".")[0])


def newest_state(store: Path) -> Path | None:
    """The newest file with the arrays of one step; None where none was saved yet."""
    states = states_of(store)
    return store / states[-1] if states else None


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
    with suppress(OSError):  # a file system without locks
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            except BlockingIOError:
                return True
    return False


def require_live_place(path: str | os.PathLike[str], *, resume: bool = False, force: bool = False) -> None:
    """Refuse a folder in which no live store can or may be written, before anything runs; writes nothing.

    Raises OSError where nothing can be written there, and FileExistsError where what is there must stay.
    """
    place = require_writable(path)
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise TakenError(
            f"{place} is {kind_of(place.lstat().st_mode)}, but a live run is a folder; name another path"
        )
    if not is_live_store(place):
        if os.listdir(place):
            raise TakenError(f"{place} has files in it that are no live run; name another path")
    elif not (resume or force):
        raise TakenError(
            f"{place} has a run already; go on in it with resume=True, begin it anew with force=True (its rows are lost), "
            "or name another path"
        )


# --- writing


class LiveStore:
    """A live store that this process writes.

    ``path``: the folder; made where it is missing.
    ``resume``: go on in the store that is there. Without one a new store begins.
    ``force``: begin anew in the place of the store that is there.
    ``keep_states``: how many runs with the arrays of one step are kept, the newest ones. One more stays for those who are
    reading it.
    Raises BusyError: Where another process or recorder writes it.
    Raises SchemaError: Where the store that is to go on is damaged.
    Raises OSError: As of `require_live_place`.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, resume: bool = False, force: bool = False, keep_states: int = 1
    ) -> None:
        require_live_place(path, resume=resume, force=force)
        self.path = made_folder(Path(os.path.realpath(path)))
        self._keep_states = max(2, keep_states + 1)
        self._log: int | None = open_below(self.path, LOG, os.O_RDWR | os.O_CREAT)
        _open.add(self)
        try:
            self._lock()
            if not resume:
                os.ftruncate(self._log, 0)
                for name in states_of(self.path):
                    remove_below(self.path, name)
            self._rows = LiveRows(self.path)
            self._is_resumed = bool(self._rows.rows)
            created = datetime.now(UTC).isoformat(timespec="seconds")
            begun = {"format": FORMAT, "version": VERSION, "run": uuid.uuid4().hex, "created": created}
            opened = {"time": time.time(), "pid": os.getpid(), "host": socket.gethostname()}
            self._write({**({} if self._rows.end else {"begun": begun}), "opened": opened})
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        for _ in range(20):
            try:
                if fcntl is not None and self._log is not None:
                    fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.01)  # a reader holds it for an instant, to see whether somebody writes
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                return  # where a file system has no locks, a second writer is not noticed
        who = "another recorder"
        with suppress(Exception):  # what is known is enough where its log cannot be read at this moment
            writer = LiveRows(self.path).writer
            since = datetime.fromtimestamp(writer["time"], UTC).isoformat(sep=" ", timespec="seconds")
            who += f" (process {writer['pid']} on {writer['host']}, since {since})"
        raise BusyError(f"{self.path} is being written by {who}; end it, or name another path")

    @property
    def last_step(self) -> int | None:
        """The step of the last row; None where there is none."""
        return self._rows.last_step

    @property
    def attrs(self) -> dict[str, dict[str, Any]]:
        """What was noted of each group, by its path; of the run itself at ``""``."""
        return self._rows.attrs

    @property
    def has_state(self) -> bool:
        """Whether a run with the arrays of one step was saved; without one nobody can open the store."""
        return bool(states_of(self.path))

    def append(self, step: int, numbers: Numbers, *, coords: Mapping[str, Any] | None = None) -> None:
        """Add the row of one step.

        A variable may appear at any step, with its dims; it is NaN before. Where it is missing later, it is NaN there. A step
        that is not after the last one supersedes the rows from it on.

        ``numbers``: the dims are without ``step``, and are needed the first time. Stored as float32 where they are that, and
        as float64 else.
        ``coords``: coordinates of groups that no saved state has, needed once.
        Raises InputError: For a new variable without dims, or a known one with another shape.
        Raises OSError: Where it was not written, as on a full disk; the store is as it was before.
        """
        head: dict[str, Any] = {"variables": {}, "coords": {}}
        for name in [name for name in numbers if name not in self._rows.variables]:
            if not isinstance(numbers[name], tuple):
                raise InputError(f"{name} is new and has no dims; give (dims, array)")
            dims, values, *attrs = numbers[name]
            array = np.asarray(values)
            dtype = "<f4" if array.dtype == np.float32 else "<f8"
            fields = {"shape": list(array.shape), "dtype": dtype, "attrs": dict(*attrs)}
            head["variables"][name] = {"dims": _listed(dims), **fields}
        for name in [name for name in coords or {} if name not in self._rows.coords]:
            dims, values, *attrs = (coords or {})[name]
            head["coords"][name] = {
                "dims": _listed(dims), "values": np.asarray(values).tolist(), "attrs": dict(*attrs)
            }  # fmt: skip
        head = {key: of for key, of in head.items() if of}
        variables, _, _ = self._rows.checked(head)
        head |= {"step": int(step), "time": time.time()} | ({"resumed": True} if self._is_resumed else {})
        every = {**self._rows.variables, **variables}
        self._write(head, b"".join([_row_part(name, numbers.get(name), of) for name, of in every.items()]))
        self._is_resumed = False

    def note(self, attrs: Mapping[str, Any], path: str = "") -> None:
        """Note attributes of the run, or of a group such as ``"metrics"``; they replace those of the same name."""
        known = self.attrs.get(path, {})
        if changed := {
            name: value for name, value in attrs.items() if name not in known or known[name] != value
        }:
            self._write({"attrs": {path: changed}})

    def _write(self, head: dict[str, Any], data: bytes = b"") -> None:
        """Append a frame, all or nothing of it; OSError where it was not written, as on a full disk."""
        descriptor, end, content = self._require_present(), self._rows.end, packed(head, data)
        try:
            # What an interrupt kept from being counted, or a full disk from being undone.
            if os.fstat(descriptor).st_size > end:
                os.ftruncate(descriptor, end)
            os.lseek(descriptor, end, os.SEEK_SET)
            if os.write(descriptor, content) < len(content):
                raise StorageError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / LOG))
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, end)
            raise
        data_at = len(content) - len(data)
        self._rows.take(content[HEAD.size : data_at], end + data_at, end + len(content))

    def _require_present(self) -> int:
        """The log's descriptor; FileNotFoundError where the log at its path is another one or none."""
        if self._log is None:
            raise InputError(f"{self.path} is closed")
        with suppress(OSError):
            if os.path.samestat(os.lstat(self.path / LOG), os.fstat(self._log)):
                return self._log
        raise AbsentError(f"{self.path} has gone, or another one is in its place")

    def save_state(self, run: xr.DataTree) -> None:
        """Save a run with the arrays of its last step: raw sequences, pooled sums, coverage and attributes."""
        self._require_present()
        if os.path.islink(self.path / STATES):
            raise TakenError(f"{self.path / STATES} is a link; expected a folder")
        states = states_of(self.path)
        number = 1 + _number(states[-1]) if states else 1
        state = run.map_over_datasets(lambda of: of.isel(step=[-1]) if of.sizes.get("step", 1) > 1 else of)
        state.attrs = {**run.attrs, RUN_ID: self._rows.run}
        save_run(state, self.path / STATES / f"{number:06d}.zarr.zip")
        for name in states_of(self.path)[: -self._keep_states]:
            remove_below(self.path, name)

    def finish(self) -> None:
        """Note that the training ended, and end writing."""
        self._write({"finished": True})
        os.fsync(self._require_present())
        self.close()

    def close(self) -> None:
        """End writing; a store that was not finished looks like that of a killed writer. Calling it twice is fine."""
        log, self._log = self._log, None
        if log is not None:
            os.close(log)
        if hasattr(self, "_rows"):
            self._rows.close()

    def remove(self) -> None:
        """End writing and remove the store; files of others stay, and their folder."""
        self._require_present()
        for name in [*states_of(self.path), LOG]:
            remove_below(self.path, name)
        self.close()
        with suppress(OSError):  # not empty: files of others
            remove_below(self.path, STATES)
            remove_below(self.path.parent, self.path.name)


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


_open: weakref.WeakSet[LiveStore] = weakref.WeakSet()


def _leave_to_parent() -> None:
    # A child shares the lock: a worker that outlives a killed trainer would hold it. Closing it there leaves the parent's.
    for store in list(_open):
        store.close()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_leave_to_parent)
