"""How does a run get to disk while it is measured? Row by row, into a log that survives its writer.

Large arrays are in runs of one step in ``states``, each written by `save_run`.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import time
import uuid
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
from depthscope.diagnostics.schema.live_rows import (
    FINDINGS,
    FORMAT,
    HEAD,
    LOG,
    MAGIC,
    VERSION,
    LiveRows,
    Numbers,
    fcntl,
    is_locked,
    packed,
)
from depthscope.diagnostics.schema.saving import save_run

STATES = "states"
RUN_ID = "live_run"
"""Attribute of the runs with the arrays of one step: the id of the run that the store is of."""

_STATE = re.compile(r"\d{6,9}\.zarr\.zip")


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
    def has_state(self) -> bool:
        """Whether a run with the arrays of one step was saved; without one nobody can open the store."""
        return bool(states_of(self.path))

    def append(self, step: int, numbers: Numbers, coords: Mapping[str, Any] | None = None) -> None:
        """Add the row of one step.

        A variable may appear at any step, with its dims; it is NaN before. Where it is missing later, it is NaN there. A step
        that is not after the last one supersedes the rows from it on.

        ``numbers``: the dims are without ``step``, and are needed the first time. Stored as float32 where they are that, and
        as float64 else.
        ``coords``: coordinates of groups that no saved state has, needed once.
        Raises InputError: For a new variable without dims, or a known one with another shape.
        Raises OSError: Where it was not written, as on a full disk; the store is as it was before.
        """
        head, data = self._rows.encoded(step, numbers, coords or {})
        self._write(head | ({"resumed": True} if self._is_resumed else {}), data)
        self._is_resumed = False

    def note(self, findings: Sequence[Mapping[str, Any]]) -> None:
        """Add findings, each with the ``step`` of its row; OSError where they were not written."""
        if findings:
            self._write({FINDINGS: findings})

    def _write(self, head: dict[str, Any], data: bytes = b"") -> None:
        """Append a frame, all or nothing of it; OSError where it was not written, as on a full disk."""
        descriptor, end, content = self._require_present(), self._rows.end, packed(head, data)
        self._rows.require_room(head, len(content) - len(data))
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


_open: weakref.WeakSet[LiveStore] = weakref.WeakSet()


def _leave_to_parent() -> None:
    # A child shares the lock: a worker that outlives a killed trainer would hold it. Closing it there leaves the parent's.
    for store in list(_open):
        store.close()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_leave_to_parent)
