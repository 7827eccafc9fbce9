"""How does a run get to disk while it is measured? Row by row, into a log that survives its writer; the format is in the docs.

A row is one frame, written by one call of the system at the end of the log: a writer that is killed leaves complete frames and
perhaps the beginning of one, which is ignored and overwritten. Full logs become files of columns (`live_store_columns`), and a
new log takes the place of the former one in one step. Large arrays are in runs of one step, each written by `save_run`.
"""

from __future__ import annotations

import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.atomic_writes import kind_of, made_folder, remove_below, require_writable
from depthscope.diagnostics.errors import BusyError, InputError, TakenError
from depthscope.diagnostics.schema.live_store_columns import OlderRows, columns_name, write_columns
from depthscope.diagnostics.schema.live_store_files import (
    COLUMNS,
    LOCK,
    LOG,
    STATES,
    WriterLock,
    files_of,
    is_live_store,
    number_of,
    remove_inside,
    require_no_link,
)
from depthscope.diagnostics.schema.live_store_frames import BEGIN, DECLARE, NOTE, ROW
from depthscope.diagnostics.schema.live_store_history import History, read_history
from depthscope.diagnostics.schema.live_store_log import RowLog
from depthscope.diagnostics.schema.live_store_reading import RUN_ID, require_own_files
from depthscope.diagnostics.schema.live_store_rows import ROW_HEAD
from depthscope.diagnostics.schema.live_store_statements import (
    Declared,
    as_json,
    attributes_of,
    coordinate_of,
    declared_of,
)
from depthscope.diagnostics.schema.saving import save_run

MAX_LOG_BYTES, MAX_LOG_ROWS = 16 << 20, 8192
"""A log that has more becomes a file of columns: as much as is read in 20 ms when a run is opened. Heuristics of ours."""

Numbers = Mapping[str, Any]
"""Values by ``group/variable`` or ``group/chain/variable``: an array, or ``(dims, array)`` or ``(dims, array, attrs)``."""


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
    names, foreign = files_of(place)
    if foreign is not None:
        raise TakenError(
            f"{place} contains {foreign}, which is not a part of a live run; move it away, or name another path"
        )
    if names and not is_live_store(place) and not force:
        raise TakenError(
            f"{place} contains {min(names)} of a live run whose log is gone; remove it with force=True, or name another path"
        )
    if is_live_store(place) and not (resume or force):
        raise TakenError(
            f"{place} has a run already; go on in it with resume=True, begin it anew with force=True (its rows are lost), "
            "or name another path"
        )


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
        self.path = Path(os.path.realpath(path))
        made_folder(self.path)
        self._log = RowLog(self.path)
        self._num_log_rows, self._full = 0, MAX_LOG_BYTES
        self._keep_states = max(2, keep_states + 1)
        self._lock = self._locked()
        try:
            # Once more, now that nobody else writes.
            require_live_place(self.path, resume=resume, force=force)
            self._is_resumed = resume and is_live_store(self.path)
            if not self._is_resumed:
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
                last = read_history(self.path, despite_damage=True).attempts[-1]
                since = datetime.fromtimestamp(last["time"], UTC).isoformat(sep=" ", timespec="seconds")
                who += f" (process {last['pid']} on {last['host']}, since {since})"
            raise BusyError(f"{self.path} is being written by {who}; end it, or name another path") from None

    def _begin(self) -> None:
        if self._is_resumed:
            history = read_history(self.path)
            require_own_files(files_of(self.path)[0], history)
            history.steps()  # refused where a file of older rows is missing, or of another run
            self._log.open(history.end, history.checksum)
            self._num_log_rows, self._full = len(history.rows), history.end + MAX_LOG_BYTES
            self._last_step = history.last_step
            self._know_history(history)
        else:
            history = History(self.path)
            history.run, history.created = uuid.uuid4().hex, datetime.now(UTC).isoformat(timespec="seconds")
            self._last_step = None
            self._start_log(history)
        attempt = {"note": "opened", "time": time.time(), "pid": os.getpid(), "host": socket.gethostname()}
        self._log.write([(NOTE, as_json(attempt))])
        self._history.take_note(attempt)
        self._remove_unused_columns()

    def _know_history(self, history: History) -> None:
        """Write on from a history, whose rows are on the disk and not needed in memory."""
        history.forget_rows()
        self._history = history

    def _remove_everything(self) -> None:
        names = files_of(self.path)[0]
        for name in (LOG, *names):  # the log first: without it the folder is no store
            remove_inside(self.path, name)
        for folder in (COLUMNS, STATES):
            with suppress(OSError):  # files of others stay
                require_no_link(self.path, folder)
                remove_below(self.path, folder)

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
        return bool(self._own_files(STATES))

    def append(
        self,
        step: int,
        numbers: Numbers,
        *,
        coords: Mapping[str, Any] | None = None,
    ) -> None:
        """Add the row of one step, in about 20 µs for a hundred variables.

        A variable may appear at any step, with its dims; it is NaN before. Where it is missing later, it is NaN there. A step
        that is not after the last one supersedes the rows from it on.

        ``numbers``: by ``group/variable`` or ``group/chain/variable``; the dims are without ``step``, and are needed
        the first time. Stored as float32 where they are that, and as float64 else.
        ``coords``: coordinates of groups that no saved state has, needed once.
        Raises InputError: For a new variable without dims, or a known one with another shape.
        Raises OSError: Where it was not written, as on a full disk; the store is as it was before.
        """
        variables = self._history.variables
        declared, added = self._declaration(numbers, coords or {})
        data = self._row_data(numbers, {**variables, **declared} if declared else variables)
        row = b"".join([ROW_HEAD.pack(step, time.time(), len(data)), *data])
        frames = [*self._declared_frames(declared, added), (ROW, row)]
        if self._is_resumed:
            # With the first row and not before: an attempt that measures nothing supersedes nothing.
            frames.insert(0, (NOTE, as_json({"note": "resumed", "step": int(step)})))
        self._log.write(frames)
        self._history.declare(declared, added)
        self._is_resumed = False
        self._last_step = step
        self._num_log_rows += 1
        if self._num_log_rows >= MAX_LOG_ROWS or self._log.size >= self._full:
            self._compact()

    def _declared_frames(
        self, declared: Mapping[str, Declared], added: Mapping[str, Any]
    ) -> list[tuple[int, bytes]]:
        if not declared and not added:
            return []
        described = {name: one.as_dict() for name, one in declared.items()}
        payload = as_json({"variables": described, "coords": added})
        self._history.require_declarable(declared, added)
        self._history.require_text(len(payload))
        return [(DECLARE, payload)]

    def _declaration(
        self, numbers: Numbers, coords: Mapping[str, Any]
    ) -> tuple[dict[str, Declared], dict[str, dict[str, Any]]]:
        """The variables and coordinates that come for the first time."""
        known = self._history
        declared, added = {}, {}
        for name in [name for name in numbers if name not in known.variables]:
            if not isinstance(numbers[name], tuple):
                raise InputError(f"{name} is new and has no dims; give (dims, array)")
            dims, values, *attrs = numbers[name]
            array = np.asarray(values)
            dtype = "<f4" if array.dtype == np.float32 else "<f8"
            fields = {"dims": _dims(dims), "shape": array.shape, "dtype": dtype, "attrs": dict(*attrs)}
            declared[name] = declared_of(name, fields)
        for name in [name for name in coords if name not in known.coords]:
            dims, values, *attrs = coords[name]
            fields = {"dims": _dims(dims), "values": np.asarray(values).tolist(), "attrs": dict(*attrs)}
            added[name] = coordinate_of(name, fields)
        return declared, added

    def _row_data(self, numbers: Numbers, variables: Mapping[str, Declared]) -> list[bytes]:
        data = []
        for name, known in variables.items():
            given = numbers.get(name)
            if given is None:
                data.append(np.full(known.shape, math.nan, known.dtype).tobytes())
                continue
            array = np.asarray(given[1] if isinstance(given, tuple) else given, known.numpy_dtype)
            if array.shape != known.shape:
                raise InputError(
                    f"{name} has the shape {array.shape}, expected {known.shape} as in the rows before; "
                    "a changed model needs a store of its own"
                )
            data.append(array.tobytes())
        return data

    def note(self, attrs: Mapping[str, Any], path: str = "") -> None:
        """Note attributes of the run, or of a group such as ``"metrics"``; they replace those of the same name."""
        known = self.attrs.get(path, {})
        changed = {name: value for name, value in attrs.items() if name not in known or known[name] != value}
        if not changed:
            return
        note = {"note": "attributes", "attrs": {path: changed}}
        payload = as_json(note)
        attributes_of(path, known | changed)
        self._history.require_text(len(payload))
        self._log.write([(NOTE, payload)])
        self._history.take_note(note)

    def save_state(self, run: xr.DataTree) -> None:
        """Save a run with the arrays of its last step: raw sequences, pooled sums, coverage and attributes."""
        self._log.require_present()
        require_no_link(self.path, STATES)
        name = f"{STATES}/{self._next_number(STATES):06d}.zarr.zip"
        self._name_file(name)
        state = run.map_over_datasets(lambda of: of.isel(step=[-1]) if of.sizes.get("step", 1) > 1 else of)
        state.attrs = {**run.attrs, RUN_ID: self._history.run}
        save_run(state, self.path / name)
        for old in self._own_files(STATES)[: -self._keep_states]:
            remove_inside(self.path, old)

    def _name_file(self, name: str) -> None:
        """Name a file in the log before it is written: what the log does not name is of another run, and is never removed."""
        note = {"note": "file", "name": name}
        self._log.write([(NOTE, as_json(note))])
        self._history.take_note(note)

    def _own_files(self, folder: str) -> list[str]:
        """Files in one of the folders that the log names, oldest first."""
        self._log.require_present()
        names = self._history.files.intersection(files_of(self.path)[0])
        return sorted((name for name in names if name.startswith(folder)), key=number_of)

    def _named(self, folder: str) -> list[str]:
        return [name for name in self._history.files if name.startswith(folder)]

    def _next_number(self, folder: str) -> int:
        return 1 + max(map(number_of, self._named(folder)), default=0)

    def finish(self) -> None:
        """Note that the training ended, and end writing."""
        self._log.write([(NOTE, b'{"note": "finished"}')], sync=True)
        self.close()

    def close(self) -> None:
        """End writing; a store that was not finished looks like that of a killed writer. Calling it twice is fine."""
        self._log.close()
        if hasattr(self, "_lock"):
            self._lock.release()

    def remove(self) -> None:
        """End writing and remove the store; files of others stay, and their folder."""
        self._remove_everything()
        self.close()
        with suppress(OSError):
            remove_below(self.path, LOCK)
            remove_below(self.path.parent, self.path.name)

    # --- older rows

    def _start_log(self, history: History) -> None:
        """A log of no rows takes the place of the one that is there."""
        self._log.start([(BEGIN, as_json(history.begin_frame()))])
        self._num_log_rows, self._full = 0, self._log.size + MAX_LOG_BYTES
        history.begun = frozenset(part.name for part in history.older)
        self._know_history(history)

    def _compact(self) -> None:
        """Write the rows of the log as columns, and begin a new log that names them."""
        try:
            self._write_columns()
        except (OSError, ValueError):
            # Every row is in the log, which goes on growing: the next attempt is made when as much again is in it.
            self._num_log_rows, self._full = 0, self._log.size + MAX_LOG_BYTES

    def _write_columns(self) -> None:
        require_no_link(self.path, COLUMNS)
        history = read_history(self.path)
        history.older += write_rows(history, self._next_number(COLUMNS), self._name_file)
        # Those that were removed are forgotten, but for the last number: none is given twice.
        last = {max(names, key=number_of) for folder in (STATES, COLUMNS) if (names := self._named(folder))}
        history.files = {*self._own_files(STATES), *self._own_files(COLUMNS), *last}
        self._start_log(history)
        self._remove_unused_columns()

    def _remove_unused_columns(self) -> None:
        """Remove files that the log names and does not begin with: of a writer that died meanwhile, or superseded."""
        for name in self._own_files(COLUMNS):
            if name not in self._history.begun:
                remove_inside(self.path, name)


def _dims(dims: Any) -> list[str]:
    return [dims] if isinstance(dims, str) else list(dims)


def write_rows(history: History, first_number: int, name_file: Callable[[str], None]) -> list[OlderRows]:
    """Write the rows of a log; ``name_file`` is called with each file before it is written.

    What was not measured yet in a stretch of rows takes no room in its file.
    """
    parts: list[OlderRows] = []
    start = 0
    for num_variables, stretch in groupby(history.rows.counts):
        end = start + len(list(stretch))
        number = first_number + len(parts)
        name_file(columns_name(number))
        parts.append(_write_part(history, number, start, end, num_variables))
        start = end
    return parts


def _write_part(history: History, number: int, start: int, end: int, num_variables: int) -> OlderRows:
    size, steps = end - start, np.array(history.rows.steps[start:end], "<i8")

    def columns() -> Iterator[np.ndarray]:
        yield steps
        yield np.array(history.rows.times[start:end], "<f8")
        for name in list(history.variables)[:num_variables]:
            yield history.values(name, start=history.num_older + start)[:size]

    return OlderRows(
        store=history.store,
        run=history.run,
        number=number,
        size=size,
        num_variables=num_variables,
        row_bytes=history.ends[num_variables],
        checksum=write_columns(history.store, history.run, number, size, num_variables, columns()),
        num_rows=size,
        first=int(steps[0]),
        last=int(steps[-1]),
    )
