"""How is a live store read? As a run, whether it grows, its writer was killed or it is finished; and it says which."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from depthscope.diagnostics.schema.limits import Limit, require_ordinary
from depthscope.diagnostics.schema.live_store_files import (
    LOG,
    STATES,
    foreign_file,
    is_being_written,
    numbered,
    open_inside,
)
from depthscope.diagnostics.schema.live_store_history import History, read_history
from depthscope.diagnostics.schema.validation import SchemaError, validate

LIVE = "live_store"
"""Attribute of a run that was opened from a live store: the fields of `Status`."""

POOLED_STEP = "pooled_step"
"""Attribute of /statistics: the step of its variables without a step and of the trace, where later steps have rows."""

RESUMED_AT = "resumed_at"
"""Attribute of a run: the steps at which a later attempt went on."""


@dataclass(frozen=True)
class Status:
    """What a live store is at the moment.

    Parameters
    ----------
    state : str
        ``"growing"``, ``"killed"`` or ``"finished"``; ``"unknown"`` where the writer ran on another machine and holds no lock
        that is seen here.
    last_step, num_rows : int
        Of its rows.
    age_seconds : float
        Since the last row.
    pid, host : int and str
        Of the last writer.
    state_step : int
        The step of the raw sequences and of the other large arrays.
    torn_bytes : int
        At the end of the log, of a row whose writer died: ignored.
    resumed : list of dict
        Of each later attempt the ``step`` at which it went on, and how many rows it ``superseded``.
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

    @property
    def sentence(self) -> str:
        """The same in words."""
        words = [
            f"{self.state}: step {self.last_step} is the last of {self.num_rows}, {_duration(self.age_seconds)} ago"
        ]
        words.append(f"written by process {self.pid} on {self.host}")
        if self.state_step != self.last_step:
            words.append(f"raw sequences of step {self.state_step}")
        words += [
            f"resumed at step {one['step']} ({one['superseded']} rows superseded)" for one in self.resumed
        ]
        if self.torn_bytes:
            words.append(f"{self.torn_bytes} bytes of a torn row ignored")
        return ", ".join(words)

    def as_dict(self) -> dict[str, Any]:
        """The fields and the sentence, as an attribute."""
        return {**asdict(self), "sentence": self.sentence}


def open_live(
    store: Path, open_state: Callable[[Path], xr.DataTree], *, verify: bool, max_bytes: int | None
) -> xr.DataTree:
    """Open a live store; its columns are read when they are used, each compared with its checksum.

    Parameters
    ----------
    store : Path
        The folder.
    open_state : callable
        Opens a run of one step, with all checks of `open_run`.
    verify : bool
        Refuse a log that is damaged before its end; else what is before the damage is opened.
    max_bytes : int or None
        As in `open_run`.

    Returns
    -------
    DataTree

    Raises
    ------
    SchemaError
        For a damaged store, one in which no step was finished, and one with anything in it that no live store has.
    """
    require_ordinary(store, folder=True)
    foreign = foreign_file(store)
    if foreign is not None:
        raise SchemaError(f"it contains {foreign}, which is no part of a live run; move it away")
    # Before the log: a writer saves the arrays of a step before its row.
    run = _newest_state(store, open_state)
    try:
        history, found = read_history(store, despite_damage=not verify)
        status = status_of(store, history, found.torn, None if run is None else _step_of(run))
        if run is None or not history.num_rows:
            raise SchemaError(f"no step was finished in it yet ({status.sentence})")
        _check_size(store, history, max_bytes)
        opened = _with_rows(run, history, status)
        validate(opened)
    except BaseException:
        if run is not None:
            run.close()
        raise
    opened.set_close(run.close)
    return opened


def _newest_state(store: Path, open_state: Callable[[Path], xr.DataTree]) -> xr.DataTree | None:
    for _ in range(5):
        states = list(numbered(store / STATES, ".nc").values())
        if not states:
            return None
        try:
            with open_inside(states[-1]):
                pass  # no link, no pipe
            return open_state(states[-1])
        except (FileNotFoundError, SchemaError):
            if states[-1].exists():
                raise
            # Its writer has just removed it for a newer one.
    raise SchemaError("its files change faster than they can be opened; try again")


def status_of(store: Path, history: History, torn: int, state_step: int | None) -> Status:
    """What a live store is at the moment.

    Parameters
    ----------
    store : Path
        The folder.
    history : History
        Its rows.
    torn : int
        Bytes after the last whole frame of its log.
    state_step : int or None
        Of the large arrays, where they were looked at.

    Returns
    -------
    Status
    """
    writer: dict[str, Any] = history.attempts[-1] if history.attempts else {"pid": 0, "host": ""}
    if is_being_written(store):
        # What looks torn is a row that is being written.
        state, torn = "growing", 0
    elif history.finished:
        state = "finished"
    else:
        state = "killed" if writer["host"] == socket.gethostname() else "unknown"
    last_time = history.last_time
    return Status(
        state=state,
        last_step=history.last_step,
        num_rows=history.num_rows,
        age_seconds=max(0.0, time.time() - (math.nan if last_time is None else last_time)),
        pid=int(writer["pid"]),
        host=str(writer["host"]),
        state_step=state_step,
        torn_bytes=torn,
        resumed=[dict(one) for attempt in history.attempts for one in attempt["resumed"]],
    )


def _step_of(run: xr.DataTree) -> int | None:
    """The last step of the statistics of a saved state."""
    for node in run.subtree:
        steps = node.to_dataset().get("step")
        if node.path.startswith("/statistics") and steps is not None and steps.size:
            return int(steps.values[-1])
    return None


def _check_size(store: Path, history: History, max_bytes: int | None) -> None:
    stored = (store / LOG).stat().st_size + sum(part.file.path.stat().st_size for part in history.older)
    row = sum(declared.num_bytes for declared in history.variables.values())
    Limit.of(stored, max_bytes).check(history.num_rows * row)


def _with_rows(run: xr.DataTree, history: History, status: Status) -> xr.DataTree:
    groups = {node.path.strip("/"): node.to_dataset(inherit=False) for node in run.subtree}
    steps = history.steps()
    for path in dict.fromkeys(name.rpartition("/")[0] for name in (*history.variables, *history.coords)):
        groups[path] = _group_with_rows(path, groups.get(path, xr.Dataset()), history, steps)
        groups[path].attrs.update(dict(history.attrs.get(path, {})))
        if status.state_step != status.last_step:
            groups[path].attrs[POOLED_STEP] = status.state_step
    resumed = [one["step"] for one in status.resumed]
    groups[""].attrs.update(
        {
            **dict(history.attrs.get("", {})),
            "created": history.created,
            **({RESUMED_AT: resumed} if resumed else {}),
            LIVE: status.as_dict(),
        }
    )
    opened = xr.DataTree.from_dict({f"/{path}": dataset for path, dataset in groups.items()})
    opened.encoding.update(run.encoding)
    return opened


def _group_with_rows(path: str, known: xr.Dataset, history: History, steps: np.ndarray) -> xr.Dataset:
    """A group in which what has a step is of the rows, and the rest as in the saved state."""
    kept = known.drop_dims("step") if "step" in known.dims else known
    coords: dict[str, Any] = {"step": ("step", steps)}
    for name, fields in history.coords.items():
        group, _, label = name.rpartition("/")
        if group == path and label not in kept.variables:
            values = np.asarray(fields["values"])
            texts = values.astype(object) if values.dtype.kind == "U" else values
            coords[label] = (fields["dims"], texts, dict(fields["attrs"]))
    variables = {}
    for name, declared in history.variables.items():
        group, _, label = name.rpartition("/")
        if group == path:
            attrs = known[label].attrs if label in known.variables else dict(declared.attrs)
            lazy = indexing.LazilyIndexedArray(_Rows(history, name))
            variables[label] = xr.Variable(("step", *declared.dims), lazy, attrs)
    return kept.assign_coords(coords).assign(variables)


class _Rows(BackendArray):
    """One variable of every row, read as a whole when a part of it is used."""

    def __init__(self, history: History, name: str) -> None:
        declared = history.variables[name]
        self.shape = (history.num_rows, *declared.shape)
        self.dtype = np.dtype(declared.dtype)
        self._read = partial(history.values, name)

    def __deepcopy__(self, memo: Any) -> _Rows:
        return self  # what was written is never changed

    def __getitem__(self, key: Any) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.BASIC, lambda index: self._read()[index]
        )


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "an unknown time"
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
