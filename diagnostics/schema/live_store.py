"""How does a run get to disk while it is measured? Row by row, into a log that survives its writer; the format is in the docs.

A row is one frame, written by one call of the system at the end of the log: a writer that is killed leaves whole frames and
perhaps the beginning of one, which is ignored and overwritten. Full logs become files of columns (`live_store_columns`), and a
new log takes the place of the former one in one step. Large arrays are in runs of one step, each written by `save_run`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.atomic_writes import kind_of, replaced_file, require_writable
from depthscope.diagnostics.schema.attributes import json_default
from depthscope.diagnostics.schema.live_store_columns import STEP, TIME, read_index, write_columns
from depthscope.diagnostics.schema.live_store_files import (
    COLUMNS,
    LOCK,
    LOG,
    STATES,
    WriterLock,
    foreign_file,
    is_live_store,
    numbered,
)
from depthscope.diagnostics.schema.live_store_frames import BEGIN, DECLARE, LATER, NOTE, ROW, packed, scan
from depthscope.diagnostics.schema.live_store_history import (
    LATER_HEAD,
    ROW_HEAD,
    Declared,
    History,
    OlderRows,
    Row,
    columns_path,
    read_history,
    require_declarable,
)
from depthscope.diagnostics.schema.saving import save_run

SYNC_SECONDS = 10.0
"""The log is flushed to the disk at most this often: a killed process loses nothing, a power cut the rows of these seconds."""

MAX_LOG_BYTES, MAX_LOG_ROWS = 16 << 20, 8192
"""A log that has more becomes a file of columns: as much as is read in 20 ms when a run is opened. Heuristics of ours."""

Numbers = Mapping[str, Any]
"""Values by ``group/variable`` or ``group/chain/variable``: an array, or ``(dims, array)`` or ``(dims, array, attrs)``."""


def require_live_place(path: str | os.PathLike[str], *, resume: bool = False, force: bool = False) -> None:
    """Refuse a folder in which no live store can or may be written, before anything runs; writes nothing.

    Parameters
    ----------
    path : path-like
        Of the folder.
    resume : bool
        Whether a store that is there goes on.
    force : bool
        Whether a store that is there is begun anew, and its rows are lost.

    Raises
    ------
    OSError
        Where nothing can be written there; FileExistsError where what is there must stay.
    """
    place = require_writable(path)
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise FileExistsError(
            f"{place} is {kind_of(place.lstat().st_mode)}, but a live run is a folder; name another path"
        )
    foreign = foreign_file(place)
    if foreign is not None:
        raise FileExistsError(
            f"{place} contains {foreign}, which is no part of a live run; move it away, or name another path"
        )
    if is_live_store(place) and not (resume or force):
        raise FileExistsError(
            f"{place} has a run already; go on in it with resume=True, begin it anew with force=True (its rows are lost), "
            "or name another path"
        )


class LiveStore:
    """A live store that this process writes.

    Parameters
    ----------
    path : path-like
        The folder; made where it is missing.
    resume : bool
        Go on in the store that is there. Without one a new store begins.
    force : bool
        Begin anew in the place of the store that is there.
    keep_states : int
        How many runs with the arrays of one step are kept, the newest ones. One more stays for those who are reading it.

    Raises
    ------
    BlockingIOError
        Where another process or recorder writes it.
    SchemaError
        Where the store that is to go on is damaged.
    OSError
        As of `require_live_place`.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, resume: bool = False, force: bool = False, keep_states: int = 1
    ) -> None:
        require_live_place(path, resume=resume, force=force)
        self.path = Path(os.path.realpath(path))
        self.path.mkdir(parents=True, exist_ok=True)
        self._descriptor: int | None = None
        self._log_size, self._num_log_rows, self._full = 0, 0, MAX_LOG_BYTES
        self._keep_states = max(2, keep_states + 1)
        self._awaited: set[int] = set()  # steps whose rows get more numbers later
        self._lock = self._locked()
        try:
            # Once more, now that nobody else writes.
            require_live_place(self.path, resume=resume, force=force)
            if is_live_store(self.path) and not resume:
                self._remove_everything()
            self._begin()
        except BaseException:
            self.close()
            raise

    def _locked(self) -> WriterLock:
        try:
            return WriterLock(self.path)
        except BlockingIOError:
            who = "another recorder"
            with suppress(Exception):  # what is said is enough where its log cannot be read at this moment
                last = read_history(self.path, despite_damage=True)[0].attempts[-1]
                who += f" (process {last['pid']} on {last['host']}, since {_clock(last['time'])})"
            raise BlockingIOError(
                f"{self.path} is being written by {who}; end it, or name another path"
            ) from None

    def _remove_everything(self) -> None:
        (self.path / LOG).unlink()  # first: without it the folder is no store
        for folder in (COLUMNS, STATES):
            shutil.rmtree(self.path / folder, ignore_errors=True)

    def _begin(self) -> None:
        attempt = {"time": time.time(), "pid": os.getpid(), "host": socket.gethostname()}
        self._is_resumed = is_live_store(self.path)
        if self._is_resumed:
            self._history, found = read_history(self.path)
            self._open_log(found.end)
            self._num_log_rows = len(self._history.rows)
        else:
            self._history = History(created=datetime.now(UTC).isoformat(timespec="seconds"))
            self._start_log()
        self._last_step = self._history.last_step
        self._history.rows = []  # their numbers are on the disk
        self._write(packed(NOTE, _json({"note": "opened", **attempt})))
        self._history.take_note({"note": "opened", **attempt})
        self._remove_unused_columns()

    # --- writing

    @property
    def last_step(self) -> int | None:
        """The step of the last row; None where there is none."""
        return self._last_step

    @property
    def attrs(self) -> dict[str, dict[str, Any]]:
        """What was noted of each group, by its path; of the run itself at ``""``."""
        return self._history.attrs

    @property
    def has_state(self) -> bool:
        """Whether a run with the arrays of one step was saved; without one nobody can open the store."""
        return bool(numbered(self.path / STATES, ".nc"))

    def append(
        self,
        step: int,
        numbers: Numbers,
        *,
        coords: Mapping[str, Any] | None = None,
        complete: bool = True,
    ) -> None:
        """Add the row of one step, in about 20 µs for a hundred variables.

        A variable may appear at any step, with its dims; it is NaN before. Where it is missing later, it is NaN there. A step
        that is not after the last one supersedes the rows from it on.

        Parameters
        ----------
        step : int
            Of the training.
        numbers : mapping of str to array, (dims, array) or (dims, array, attrs)
            By ``group/variable`` or ``group/chain/variable``; the dims are without ``step``, and are needed the first time.
            Stored as float32 where they are that, and as float64 else.
        coords : mapping of str to (dims, array) or (dims, array, attrs), optional
            Coordinates of groups that no saved state has, needed once.
        complete : bool
            False where `add_later` is to give more numbers of the row.

        Raises
        ------
        ValueError
            For a new variable without dims, or a known one with another shape.
        OSError
            Where it was not written, as on a full disk; the store is as it was before.
        """
        variables = self._history.variables
        declared, added = self._declaration(numbers, coords or {})
        data = self._row_data(numbers, {**variables, **declared} if declared else variables)
        row = packed(ROW, b"".join([ROW_HEAD.pack(step, time.time(), len(data)), *data]))
        frames = [*self._declared_frames(declared, added), row]
        if self._is_resumed:
            # With the first row and not before: an attempt that measures nothing supersedes nothing.
            frames.insert(0, packed(NOTE, _json({"note": "resumed", "step": step})))
        self._write(b"".join(frames))
        self._know(declared, added)
        self._is_resumed = False
        self._last_step = step
        self._awaited = {earlier for earlier in self._awaited if earlier < step}
        if not complete:
            self._awaited.add(step)
        self._num_log_rows += 1
        if self._num_log_rows >= MAX_LOG_ROWS or self._log_size >= self._full:
            self._compact()

    def add_later(self, step: int, numbers: Numbers, *, coords: Mapping[str, Any] | None = None) -> None:
        """Add numbers to a row that is not complete; those that it has already are replaced.

        Parameters
        ----------
        step : int
            Of the row; nothing happens where it was superseded.
        numbers, coords : mapping
            As of `append`; empty where nothing comes after all.

        Raises
        ------
        ValueError
            As of `append`.
        OSError
            Where it was not written; the store is as it was before.
        """
        if step not in self._awaited:
            return
        declared, added = self._declaration(numbers, coords or {})
        variables = {**self._history.variables, **declared}
        given = {name: known for name, known in variables.items() if name in numbers}
        data = self._row_data(numbers, given)
        frames = self._declared_frames(declared, added)
        # One frame for each stretch of variables that are declared one after the other.
        places = [place for place, name in enumerate(variables) if name in numbers]
        start = 0
        for end in range(1, len(places) + 1):
            if end == len(places) or places[end] != places[end - 1] + 1:
                head = LATER_HEAD.pack(step, places[start], places[end - 1] + 1)
                frames.append(packed(LATER, b"".join([head, *data[start:end]])))
                start = end
        if frames:
            self._write(b"".join(frames))
        self._know(declared, added)
        self._awaited.discard(step)

    def _declared_frames(self, declared: Mapping[str, Declared], added: Mapping[str, Any]) -> list[bytes]:
        if not declared and not added:
            return []
        described = {name: one.as_dict() for name, one in declared.items()}
        return [packed(DECLARE, _json({"variables": described, "coords": added}))]

    def _know(self, declared: Mapping[str, Declared], added: Mapping[str, Any]) -> None:
        """Take in what was declared, now that it is written: before, it is not known to readers either."""
        for name, known in declared.items():
            self._history.add_variable(name, known)
        self._history.coords.update(added)

    def _declaration(
        self, numbers: Numbers, coords: Mapping[str, Any]
    ) -> tuple[dict[str, Declared], dict[str, Any]]:
        """The variables and coordinates that come for the first time."""
        known = self._history
        declared = {}
        for name in numbers.keys() - known.variables.keys():
            if not isinstance(numbers[name], tuple):
                raise ValueError(f"{name} came for the first time without its dims; give (dims, array)")
            dims, values, *attrs = numbers[name]
            array = np.asarray(values)
            single = array.dtype == np.float32
            dims = (dims,) if isinstance(dims, str) else tuple(dims)
            declared[name] = Declared(dims, array.shape, "<f4" if single else "<f8", dict(*attrs))
            require_declarable(name, declared[name])
        added = {}
        for name in coords.keys() - known.coords.keys():
            dims, values, *attrs = coords[name]
            dims = [dims] if isinstance(dims, str) else list(dims)
            added[name] = {"dims": dims, "values": np.asarray(values).tolist(), "attrs": dict(*attrs)}
        return {name: declared[name] for name in numbers if name in declared}, added

    def _row_data(self, numbers: Numbers, variables: Mapping[str, Declared]) -> list[bytes]:
        data = []
        for name, known in variables.items():
            given = numbers.get(name)
            if given is None:
                data.append(np.full(known.shape, math.nan, known.dtype).tobytes())
                continue
            array = np.asarray(given[1] if isinstance(given, tuple) else given, known.numpy_dtype)
            if array.shape != known.shape:
                raise ValueError(
                    f"{name} came with the shape {array.shape}, expected {known.shape} as in the rows before; "
                    "a changed model needs a store of its own"
                )
            data.append(array.tobytes())
        return data

    def note(self, attrs: Mapping[str, Any], path: str = "") -> None:
        """Note attributes of the run or of a group, which replace those of the same name.

        Parameters
        ----------
        attrs : mapping
            What JSON can express.
        path : str
            Of a group, such as ``"metrics"``; empty for the run.
        """
        if all(self.attrs.get(path, {}).get(name) == value for name, value in attrs.items()):
            return
        note = {"note": "attributes", "attrs": {path: dict(attrs)}}
        self._write(packed(NOTE, _json(note)))
        self._history.take_note(note)

    def save_state(self, run: xr.DataTree) -> None:
        """Save a run with the arrays of its last step: raw sequences, pooled sums, coverage and attributes.

        Parameters
        ----------
        run : DataTree
            Of its statistics only the last step is saved.
        """
        self._require_present()
        folder = self.path / STATES
        number = max(numbered(folder, ".nc"), default=0) + 1
        save_run(run.map_over_datasets(_last_step_alone), folder / f"{number:06d}.nc")
        for old in list(numbered(folder, ".nc").values())[: -self._keep_states]:
            old.unlink(missing_ok=True)

    def finish(self) -> None:
        """Note that the training ended, and end writing."""
        self._write(packed(NOTE, b'{"note": "finished"}'), sync=True)
        self.close()

    def close(self) -> None:
        """End writing; a store that was not finished looks like that of a killed writer. Calling it twice is fine."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        if hasattr(self, "_lock"):
            self._lock.release()

    def remove(self) -> None:
        """End writing and remove the store; files of others stay, and their folder."""
        self._remove_everything()
        self.close()
        with suppress(OSError):
            (self.path / LOCK).unlink(missing_ok=True)
            self.path.rmdir()

    # --- the log as a file

    def _open_log(self, size: int) -> None:
        """Append to the log from a size on; what is after it was torn."""
        flags = os.O_RDWR | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        former, self._descriptor = (
            self._descriptor,
            os.open(self.path / LOG, flags | getattr(os, "O_BINARY", 0)),
        )
        if former is not None:
            os.close(former)
        os.ftruncate(self._descriptor, size)
        self._log_size, self._full = size, size + MAX_LOG_BYTES
        self._synced = time.monotonic()

    def _start_log(self, rows: Iterable[Row] = ()) -> None:
        """A log of no rows, or of a few, takes the place of the one that is there."""
        begin = b"".join([packed(BEGIN, self._history.begin_frame()), *(row.frame() for row in rows)])
        with replaced_file(self.path / LOG) as fresh:
            fresh.write_bytes(begin)
        self._open_log(len(begin))
        self._num_log_rows = 0

    def _require_present(self) -> tuple[int, int]:
        """The log's descriptor and size, refused where the log at its path is another one or none."""
        if self._descriptor is None:
            raise ValueError(f"{self.path} is closed")
        mine = os.fstat(self._descriptor)
        try:
            here = os.path.samestat(os.stat(self.path / LOG), mine)
        except OSError:
            here = False
        if not here:
            raise FileNotFoundError(f"{self.path} has gone, or another one is in its place")
        return self._descriptor, mine.st_size

    def _write(self, content: bytes, *, sync: bool = False) -> None:
        descriptor, size = self._require_present()
        if size != self._log_size:
            # What an interrupt kept from being counted, or a full disk from being undone: whole frames count.
            self._log_size = scan((self.path / LOG).read_bytes()).end
            os.ftruncate(descriptor, self._log_size)
        left = memoryview(content)
        try:
            while left:  # once, but where the disk is almost full
                left = left[os.write(descriptor, left) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, self._log_size)
            raise
        self._log_size += len(content)
        if sync or time.monotonic() - self._synced >= SYNC_SECONDS:
            os.fsync(descriptor)
            self._synced = time.monotonic()

    def _compact(self) -> None:
        """Write the rows of the log as columns, and begin a new log that names them."""
        try:
            self._write_columns()
        except OSError:
            # Every row is in the log, which goes on growing: the next attempt is made when as much again is in it.
            self._num_log_rows, self._full = 0, self._log_size + MAX_LOG_BYTES

    def _write_columns(self) -> None:
        found = scan((self.path / LOG).read_bytes())
        history = History()
        history.replay(found.frames, self.path)
        # Rows that get more numbers stay in the log, where these are put into them.
        kept = [row for row in history.rows if self._awaited and row.step >= min(self._awaited)]
        history.rows = history.rows[: len(history.rows) - len(kept)]
        if history.rows:
            number = max(numbered(self.path / COLUMNS, ".cols"), default=0) + 1
            write_columns(columns_path(self.path, number), _columns(history))
            file = read_index(columns_path(self.path, number))
            steps = np.array([row.step for row in history.rows], dtype=np.int64)
            history.older.append(OlderRows(number, file, steps, len(history.rows)))
            history.rows = []
        history.begun = frozenset(part.number for part in history.older)
        self._history = history
        self._start_log(kept)
        self._num_log_rows = len(kept)
        self._remove_unused_columns()

    def _remove_unused_columns(self) -> None:
        """Remove files that the log does not begin with: of a writer that died before it named them, or superseded."""
        for number, path in numbered(self.path / COLUMNS, ".cols").items():
            if number not in self._history.begun:
                path.unlink(missing_ok=True)


def _columns(history: History) -> dict[str, np.ndarray]:
    older, history.older = history.older, []  # the rows of the log alone
    try:
        found = {
            STEP: history.steps(),
            TIME: np.array([row.time for row in history.rows]),
            **{name: history.values(name) for name in history.variables},
        }
    finally:
        history.older = older
    return found


def _last_step_alone(dataset: xr.Dataset) -> xr.Dataset:
    return dataset.isel(step=[-1]) if dataset.sizes.get("step", 1) > 1 else dataset


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, default=json_default).encode()


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds")
