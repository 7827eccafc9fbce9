"""What has been added to a live store since it was looked at last? Its new rows alone are read, and nothing twice."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from depthscope.diagnostics.schema.limits import require_ordinary
from depthscope.diagnostics.schema.live_store_files import LOG, files_of, open_inside
from depthscope.diagnostics.schema.live_store_history import History, read_history, refuse_damage, rest_of
from depthscope.diagnostics.schema.live_store_reading import (
    Status,
    refuse_foreign,
    require_own_files,
    status_of,
)
from depthscope.diagnostics.schema.live_store_rows import Cells
from depthscope.diagnostics.schema.live_store_statements import Declared
from depthscope.diagnostics.schema.validation import SchemaError

KEPT_BYTES = 256 << 20
"""Of the columns that stay in memory, those used last. A heuristic of ours: one metric of 100 000 steps has 24 to 48 MB."""


class FollowedStore:
    """The rows of a live store that may grow.

    `refresh` reads the bytes that were appended to the log; a log that was replaced by a new one (its rows are in a file of
    columns then) is read again, at most some megabytes. Columns that were read stay, and only grow.

    ``path``: the folder.
    Raises SchemaError: For a damaged store, one with anything in it that no live store has, and rows that need far
    more memory than they have bytes.
    Raises OSError: Where there is none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        require_ordinary(self.path, folder=True)
        self.steps = np.zeros(0, dtype=np.int64)
        self.times = np.zeros(0)
        self._columns: OrderedDict[tuple[str, Cells], np.ndarray] = OrderedDict()
        self._history = History(self.path)
        self._read_again()

    # --- what there is

    @property
    def variables(self) -> dict[str, Declared]:
        """What has one value per step, by ``group/variable`` or ``group/chain/variable``."""
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
        return self._inode, self._history.end

    def status(self) -> Status:
        """What the store is now: growing, killed or finished. The step of its large arrays is not looked at."""
        return status_of(self.path, self._history, None)

    # --- reading

    def refresh(self) -> bool:
        """Read what was appended since the last time."""
        history = self._history
        with open_inside(self.path, LOG) as file:
            entry = os.fstat(file.fileno())
            is_same = (entry.st_dev, entry.st_ino) == self._inode and entry.st_size >= history.end
            if is_same:
                added = rest_of(file, history.end)
        if not is_same:
            self._read_again()
            return True
        end = history.end
        history.replay(added)
        refuse_damage(history)
        if history.end > end:
            self._take_rows()
        return history.end > end

    def _read_again(self) -> None:
        for _ in range(5):
            names, foreign = files_of(self.path)
            refuse_foreign(foreign)
            with open_inside(self.path, LOG) as file:
                entry = os.fstat(file.fileno())
            history = read_history(self.path)
            now = (self.path / LOG).lstat()
            # A log that was replaced meanwhile would be followed from a byte of the other one.
            if (now.st_dev, now.st_ino) == (entry.st_dev, entry.st_ino):
                break
        else:
            raise SchemaError("its log changes faster than it can be read; try again")
        require_own_files(names, history)
        self._history, self._inode = history, (entry.st_dev, entry.st_ino)
        self._take_rows()

    def _take_rows(self) -> None:
        """Steps and times of all rows. Of the columns in memory those before a row stay, as far as they are the same."""
        history = self._history
        history.check_size()
        steps, times = history.steps(), history.times()
        same = min(len(steps), len(self.steps))
        # Times too: a training that was resumed has other numbers for the same steps.
        differs = (steps[:same] != self.steps[:same]) | (times[:same] != self.times[:same])
        same = int(np.argmax(differs)) if differs.any() else same
        for key, values in self._columns.items():
            self._columns[key] = values[:same]
        self.steps, self.times = steps, times

    def column(self, name: str, cells: Cells = ()) -> np.ndarray:
        """One variable of every row.

        Returns: Rows first, float32; NaN in rows that do not have it. It is not to be changed.
        """
        key = (name, cells)
        known = self._columns.pop(key, None)
        if known is None or len(known) < len(self.steps):
            start = 0 if known is None else len(known)
            added = self._history.values(name, cells, start=start, dtype=np.float32)
            known = added if known is None or not start else np.concatenate([known, added])
        self._columns[key] = known
        while len(self._columns) > 1 and sum(each.nbytes for each in self._columns.values()) > KEPT_BYTES:
            self._columns.popitem(last=False)
        return known

    def row(self, position: int) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """All variables of one row.

        Returns: Without those that the row does not have.
        """
        return self._history.row(position)
