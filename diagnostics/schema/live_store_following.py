"""What has been added to a live store since it was looked at last? Its new rows alone are read, and nothing twice."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from depthscope.diagnostics.schema.limits import require_ordinary
from depthscope.diagnostics.schema.live_store_columns import TIME
from depthscope.diagnostics.schema.live_store_files import LOG, foreign_file, open_inside
from depthscope.diagnostics.schema.live_store_frames import scan
from depthscope.diagnostics.schema.live_store_history import (
    MAX_LOG,
    Declared,
    read_history,
    refuse_damage,
    replay_or_refuse,
)
from depthscope.diagnostics.schema.live_store_reading import Status, status_of
from depthscope.diagnostics.schema.validation import SchemaError

KEPT_BYTES = 256 << 20
"""Of the columns that stay in memory, those used last. A heuristic of ours: one metric of 100 000 steps has 24 to 48 MB."""

Cells = tuple[int | None, ...]
"""For each of the first dims without the step the number of one label, None for all of them."""


class FollowedStore:
    """The rows of a live store that may grow.

    `refresh` reads the bytes that were appended to the log; a log that was replaced by a new one (its rows are in a file of
    columns then) is read as a whole, at most some megabytes. Columns that were read stay, and only grow.

    Parameters
    ----------
    path : path-like
        The folder.

    Raises
    ------
    SchemaError
        For a damaged store, and one with anything in it that no live store has.
    OSError
        Where there is none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        require_ordinary(self.path, folder=True)
        foreign = foreign_file(self.path)
        if foreign is not None:
            raise SchemaError(f"it contains {foreign}, which is no part of a live run; move it away")
        self.steps = np.zeros(0, dtype=np.int64)
        self.times = np.zeros(0)
        self._columns: OrderedDict[tuple[str, Cells], np.ndarray] = OrderedDict()
        self._read_whole()

    # --- what there is

    @property
    def variables(self) -> dict[str, Declared]:
        """What has one value a step, by ``group/variable`` or ``group/chain/variable``."""
        return self._history.variables

    @property
    def coords(self) -> dict[str, Any]:
        """Coordinates of the groups: ``dims``, ``values`` and ``attrs`` of each."""
        return self._history.coords

    @property
    def attrs(self) -> dict[str, dict[str, Any]]:
        """Attributes by group; those of the run are under ``""``."""
        return self._history.attrs

    @property
    def version(self) -> tuple[Any, ...]:
        """Differs whenever anything was added."""
        return self._inode, self._end

    def status(self) -> Status:
        """What the store is now: growing, killed or finished. The step of its large arrays is not looked at.

        Returns
        -------
        Status
        """
        return status_of(self.path, self._history, self._torn, None)

    # --- reading

    def refresh(self) -> bool:
        """Read what was appended since the last time.

        Returns
        -------
        bool
            Whether there was anything.

        Raises
        ------
        SchemaError
            For damage.
        OSError
            Where the store has gone.
        """
        with open_inside(self.path / LOG) as file:
            entry = os.fstat(file.fileno())
            is_same = (entry.st_dev, entry.st_ino) == self._inode and entry.st_size >= self._end
            if is_same and entry.st_size == self._end:
                self._torn = 0
                return False
            if is_same:
                file.seek(self._end)
                added = file.read(MAX_LOG + 1 - self._end)
        if not is_same:
            self._read_whole()
            return True
        found = scan(added)
        refuse_damage(self._history, found, before=self._end)
        replay_or_refuse(self._history, found.frames, self.path, first=self._num_frames)
        self._num_frames += len(found.frames)
        self._end += found.end
        self._torn = found.torn
        if found.frames:
            self._take_steps()
        return bool(found.frames)

    def _read_whole(self) -> None:
        for _ in range(5):
            with open_inside(self.path / LOG) as file:
                entry = os.fstat(file.fileno())
            history, found = read_history(self.path)
            now = (self.path / LOG).lstat()
            # A log that was replaced meanwhile would be followed from a byte of the other one.
            if (now.st_dev, now.st_ino) == (entry.st_dev, entry.st_ino):
                break
        else:
            raise SchemaError("its log changes faster than it can be read; try again")
        self._history = history
        self._older_times: dict[int, np.ndarray] = {}
        self._inode = (entry.st_dev, entry.st_ino)
        self._end, self._torn, self._num_frames = found.end, found.torn, len(found.frames)
        self._take_steps()

    def _take_steps(self) -> None:
        """Steps and times of all rows."""
        older, rows = self._history.older, self._history.rows
        for part in older:
            if part.number not in self._older_times:
                read = part.file.read(TIME)
                self._older_times[part.number] = np.full(part.num_rows, math.nan) if read is None else read
        steps = [part.steps[: part.num_rows] for part in older]
        times = [self._older_times[part.number][: part.num_rows] for part in older]
        steps_now = np.concatenate([*steps, np.array([row.step for row in rows], dtype=np.int64)])
        times_now = np.concatenate([*times, np.array([row.time for row in rows])])
        self._forget_changed(steps_now, times_now)
        self.steps, self.times = steps_now, times_now

    def _forget_changed(self, steps: np.ndarray, times: np.ndarray) -> None:
        """Of the kept columns, keep the rows that are the same as before."""
        common = min(len(steps), len(self.steps))
        # Times too: a training that was resumed has other numbers for the same steps.
        differs = (steps[:common] != self.steps[:common]) | (times[:common] != self.times[:common])
        same = int(np.argmax(differs)) if differs.any() else common
        for key, values in self._columns.items():
            self._columns[key] = values[:same]

    def column(self, name: str, cells: Cells = ()) -> np.ndarray:
        """One variable of every row.

        Parameters
        ----------
        name : str
            A key of `variables`.
        cells : tuple of int and None
            Which of its numbers, see `Cells`.

        Returns
        -------
        ndarray
            Rows first, float32; NaN in rows that do not have it. It is not to be changed.
        """
        key = (name, cells)
        known = self._columns.pop(key, None)
        if known is None or len(known) < len(self.steps):
            start = 0 if known is None else len(known)
            added = self._rows_from(start, name, cells)
            known = added if known is None or not start else np.concatenate([known, added])
        self._columns[key] = known
        while len(self._columns) > 1 and sum(each.nbytes for each in self._columns.values()) > KEPT_BYTES:
            self._columns.popitem(last=False)
        return known

    def _rows_from(self, start: int, name: str, cells: Cells) -> np.ndarray:
        declared = self.variables[name]
        chosen = tuple(slice(None) if cell is None else cell for cell in cells)
        shape = np.empty(declared.shape, dtype=bool)[chosen].shape
        found = np.full((len(self.steps) - start, *shape), math.nan, dtype=np.float32)
        at = -start  # of the first row of a part, in `found`
        for part in self._history.older:
            if at + part.num_rows > 0:
                values = part.file.read(name)
                if values is not None and values.shape[1:] != declared.shape:
                    raise SchemaError(f"{part.file.path}: {name} is not of shape {declared.shape}")
                if values is not None:
                    first = max(-at, 0)
                    found[at + first : at + part.num_rows] = values[(slice(first, part.num_rows), *chosen)]
            at += part.num_rows
        place = list(self.variables).index(name)
        begin, end = self._history.ends[place], self._history.ends[place + 1]
        for row in self._history.rows[max(-at, 0) :]:
            if place < row.num_variables:
                values = np.frombuffer(row.data[begin:end], declared.numpy_dtype).reshape(declared.shape)
                found[max(at, 0)] = values[chosen]
            at = max(at, 0) + 1
        return found

    def row(self, position: int) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """All variables of one row.

        Parameters
        ----------
        position : int
            Of the row, from 0 on.

        Returns
        -------
        dict of str to (dims, values)
            Without those that the row does not have.
        """
        found = {}
        for part in self._history.older:
            if position < part.num_rows:
                for name, declared in self.variables.items():
                    values = part.file.read(name)
                    if values is not None and values.shape[1:] == declared.shape:
                        found[name] = (declared.dims, values[position])
                return found
            position -= part.num_rows
        row = self._history.rows[position]
        ends = self._history.ends
        for place, (name, declared) in enumerate(list(self.variables.items())[: row.num_variables]):
            values = np.frombuffer(row.data[ends[place] : ends[place + 1]], declared.numpy_dtype)
            found[name] = (declared.dims, values.reshape(declared.shape))
        return found
