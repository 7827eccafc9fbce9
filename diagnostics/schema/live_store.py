"""How does a run get to disk while it is measured? Row by row, into a log that survives its writer, and opens at any time.

The frame of a step is written by one call of the system at the known end of the log: a writer that is killed leaves complete
frames and perhaps the beginning of one, which is ignored and overwritten. Large arrays are in runs of one step in
``states``, each written by `save_run`.
"""

from __future__ import annotations

import errno
import math
import os
import re
import socket
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

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
    FORMAT,
    HEAD,
    LOG,
    VERSION,
    Declared,
    LiveRows,
    as_text,
    fcntl,
    is_live_store,
    packed,
)
from depthscope.diagnostics.schema.saving import LIVE, save_run
from depthscope.diagnostics.schema.validation import SchemaError, validate

STATES = "states"
_STATE = re.compile(r"\d{6,9}\.zarr\.zip")

RUN_ID = "live_run"
"""Attribute of the runs with the arrays of one step: the id of the run that the store is of."""

POOLED_STEP = "pooled_step"
"""Attribute of /statistics: the step of its variables without a step and of the trace, where later steps have rows."""

RESUMED_AT = "resumed_at"
"""Attribute of a run: the steps at which a later attempt went on."""

Opened = TypeVar("Opened")
Numbers = Mapping[str, Any]
"""Values by ``group/variable`` or ``group/chain/variable``: an array, or ``(dims, array)`` or ``(dims, array, attrs)``."""


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
            self._is_resumed = self._rows.num_rows > 0
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
            last = LiveRows(self.path).attempts[-1]
            since = datetime.fromtimestamp(last["time"], UTC).isoformat(sep=" ", timespec="seconds")
            who += f" (process {last['pid']} on {last['host']}, since {since})"
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

    # --- writing

    def append(self, step: int, numbers: Numbers, *, coords: Mapping[str, Any] | None = None) -> None:
        """Add the row of one step.

        A variable may appear at any step, with its dims; it is NaN before. Where it is missing later, it is NaN there. A step
        that is not after the last one supersedes the rows from it on.

        ``numbers``: by ``group/variable`` or ``group/chain/variable``; the dims are without ``step``, and are needed
        the first time. Stored as float32 where they are that, and as float64 else.
        ``coords``: coordinates of groups that no saved state has, needed once.
        Raises InputError: For a new variable without dims, or a known one with another shape.
        Raises OSError: Where it was not written, as on a full disk; the store is as it was before.
        """
        head = self._layout(numbers, coords or {})
        variables, _ = self._rows.checked(head)
        head |= {"step": int(step), "time": time.time()} | ({"resumed": True} if self._is_resumed else {})
        every = {**self._rows.variables, **variables}
        self._write(head, b"".join([_row_part(name, numbers.get(name), of) for name, of in every.items()]))
        self._is_resumed = False

    def _layout(self, numbers: Numbers, coords: Mapping[str, Any]) -> dict[str, Any]:
        """The variables and coordinates that come for the first time."""
        found: dict[str, dict[str, Any]] = {"variables": {}, "coords": {}}
        for name in [name for name in numbers if name not in self._rows.variables]:
            if not isinstance(numbers[name], tuple):
                raise InputError(f"{name} is new and has no dims; give (dims, array)")
            dims, values, *attrs = numbers[name]
            array = np.asarray(values)
            dtype = "<f4" if array.dtype == np.float32 else "<f8"
            fields = {"shape": list(array.shape), "dtype": dtype, "attrs": dict(*attrs)}
            found["variables"][name] = {"dims": _listed(dims), **fields}
        for name in [name for name in coords if name not in self._rows.coords]:
            dims, values, *attrs = coords[name]
            fields = {"values": np.asarray(values).tolist(), "attrs": dict(*attrs)}
            found["coords"][name] = {"dims": _listed(dims), **fields}
        return {key: of for key, of in found.items() if of}

    def note(self, attrs: Mapping[str, Any], path: str = "") -> None:
        """Note attributes of the run, or of a group such as ``"metrics"``; they replace those of the same name."""
        known = self.attrs.get(path, {})
        if changed := {
            name: value for name, value in attrs.items() if name not in known or known[name] != value
        }:
            self._write({"attrs": {path: changed}})

    def _write(self, head: dict[str, Any], data: bytes = b"") -> None:
        """Append a frame, all or nothing of it; OSError where it was not written, as on a full disk."""
        descriptor, text, end = self._require_present(), as_text(head), self._rows.end
        content = packed(text, data)
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
        self._rows.take(text, end + HEAD.size + len(text), end + len(content))

    def _require_present(self) -> int:
        """The log's descriptor; FileNotFoundError where the log at its path is another one or none."""
        if self._log is None:
            raise InputError(f"{self.path} is closed")
        try:
            is_here = os.path.samestat(os.lstat(self.path / LOG), os.fstat(self._log))
        except OSError:
            is_here = False
        if not is_here:
            raise AbsentError(f"{self.path} has gone, or another one is in its place")
        return self._log

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


# --- opening


def open_live(store: Path, open_state: Callable[[Path], xr.DataTree]) -> xr.DataTree:
    """Open a live store: what has a step is of its rows, read when they are used, and the rest of its newest state.

    ``open_state``: opens a run of one step, with all checks of `open_run`.
    Raises SchemaError: For a damaged store, and one in which no step was finished.
    """
    # Before the log: a writer saves the arrays of a step before its row.
    state = opened_state(store, open_state)
    try:
        rows = LiveRows(store)
        status = rows.status(None if state is None else _step_of(state))
        if state is None or not rows.num_rows:
            raise SchemaError(f"no step was finished in it yet ({status.as_dict()['sentence']})")
        if state.attrs.pop(RUN_ID, None) != rows.run:
            raise SchemaError(
                f"its newest file in {STATES} is of another run than its log; copy the folder again"
            )
        groups = {node.path.strip("/"): node.to_dataset(inherit=False) for node in state.subtree}
        for path in dict.fromkeys(name.rpartition("/")[0] for name in (*rows.variables, *rows.coords)):
            groups[path] = with_rows(path, groups.get(path, xr.Dataset()), rows)
            groups[path].attrs |= rows.attrs.get(path, {})
            if status.state_step != status.last_step:
                groups[path].attrs[POOLED_STEP] = status.state_step
        resumed = {RESUMED_AT: [one["step"] for one in status.resumed]} if status.resumed else {}
        groups[""].attrs |= {
            **rows.attrs.get("", {}),
            "created": rows.created,
            **resumed,
            LIVE: status.as_dict(),
        }
        try:
            opened = xr.DataTree.from_dict({f"/{path}": dataset for path, dataset in groups.items()})
        except ValueError as error:  # unlike labels
            raise SchemaError(f"its rows do not fit to its saved arrays ({error})") from None
        validate(opened)
    except BaseException:
        if state is not None:
            state.close()
        raise
    opened.set_close(state.close)
    return opened


def opened_state(store: Path, open_state: Callable[[Path], Opened]) -> Opened | None:
    """The newest file with the arrays of one step, opened; None where none was saved yet."""
    for _ in range(5):
        state = newest_state(store)
        if state is None:
            return None
        try:
            return open_state(state)
        except (AbsentError, SchemaError):
            if os.path.lexists(state):
                raise
        # Its writer has just removed it for a newer one.
    raise SchemaError(f"{store}: its files change faster than they can be opened; try again")


def _step_of(run: xr.DataTree) -> int | None:
    """The last step of the statistics of a saved state."""
    steps = [
        node.to_dataset()["step"].values
        for node in run.subtree
        if node.path.startswith("/statistics") and node.sizes.get("step")
    ]
    return int(steps[0][-1]) if steps else None


def with_rows(path: str, known: xr.Dataset, rows: LiveRows) -> xr.Dataset:
    """A group in which what has a step is of the rows, and the rest as in the saved state."""
    kept = known.drop_dims("step") if "step" in known.dims else known
    of_group = {name.rpartition("/")[2]: name for name in rows.coords if name.rpartition("/")[0] == path}
    coords = {label: rows.coords[name] for label, name in of_group.items() if label not in kept.variables}
    variables = {}
    for name, declared in rows.variables.items():
        group, _, label = name.rpartition("/")
        if group == path:
            attrs = known[label].attrs if label in known.variables else dict(declared.attrs)
            lazy = indexing.LazilyIndexedArray(_Column(rows, name))
            variables[label] = xr.Variable(("step", *declared.dims), lazy, attrs)
    try:
        return kept.assign_coords({"step": ("step", rows.steps), **coords}).assign(variables)
    except ValueError as error:  # other labels than the saved arrays, or two things of one name
        raise SchemaError(f"the rows of /{path} do not fit to its saved arrays ({error})") from None


class _Column(BackendArray):
    """One variable of the rows that there are now, read completely when a part of it is used."""

    def __init__(self, rows: LiveRows, name: str) -> None:
        declared = rows.variables[name]
        self.shape, self.dtype = (rows.num_rows, *declared.shape), np.dtype(declared.dtype)
        self._read = partial(rows.column, name)

    def __deepcopy__(self, memo: Any) -> _Column:
        return self  # what was written is never changed

    def __getitem__(self, key: Any) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.BASIC, lambda index: self._read()[index]
        )
