"""How is a live store read? As a run, whether it grows, its writer was killed or it is finished; and it says which."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from depthscope.diagnostics.schema.limits import require_ordinary
from depthscope.diagnostics.schema.live_store_files import (
    STATES,
    files_of,
    is_being_written,
    number_of,
    open_inside,
)
from depthscope.diagnostics.schema.live_store_history import History, read_history
from depthscope.diagnostics.schema.validation import SchemaError, validate

RUN_ID = "live_run"
"""Attribute of the runs with the arrays of one step: the id of the run that the store is of."""

LIVE = "live_store"
"""Attribute of a run that was opened from a live store: the fields of `Status`."""

POOLED_STEP = "pooled_step"
"""Attribute of /statistics: the step of its variables without a step and of the trace, where later steps have rows."""

RESUMED_AT = "resumed_at"
"""Attribute of a run: the steps at which a later attempt went on."""


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

    @property
    def sentence(self) -> str:
        """The same as one sentence."""
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
    store: Path, open_state: Callable[[Path], xr.DataTree], *, max_bytes: int | None
) -> xr.DataTree:
    """Open a live store; its columns are read when they are used, each compared with its checksum.

    ``open_state``: opens a run of one step, with all checks of `open_run`.
    Raises SchemaError: For a damaged store, one in which no step was finished, and one with anything in it that no live
    store has.
    """
    require_ordinary(store, folder=True)
    names, foreign = files_of(store)
    refuse_foreign(foreign)
    # Before the log: a writer saves the arrays of a step before its row.
    state = _newest_state(store, names, open_state)
    try:
        history = read_history(store)
        require_own_files(names, history)
        status = status_of(store, history, None if state is None else _step_of(state))
        if state is None or not history.num_rows:
            raise SchemaError(f"no step was finished in it yet ({status.sentence})")
        if state.attrs.pop(RUN_ID, None) != history.run:
            raise SchemaError(
                f"its newest file in {STATES} is of another run than its log; copy the folder again from where it came"
            )
        steps = history.steps()
        history.check_size(max_bytes)
        opened = _with_rows(state, history, status, steps)
        validate(opened)
    except BaseException:
        if state is not None:
            state.close()
        raise
    opened.set_close(state.close)
    return opened


def refuse_foreign(name: str | None) -> None:
    """Refuse a folder with something in it that no live store has."""
    if name is not None:
        raise SchemaError(f"it contains {name}, which is not a part of a live run; move it away")


def require_own_files(names: Iterable[str], history: History) -> None:
    """Refuse files that the log does not name: of another run that was copied into the folder.

    ``names`` were listed before the log was read, since a writer names a file before it writes it. What has gone since then
    was this run's: a new log does not name what its writer had removed.
    """
    foreign = sorted(set(names) - history.files)
    if foreign:
        foreign = sorted(files_of(history.store)[0].intersection(foreign))
    if foreign:
        raise SchemaError(
            f"it contains {foreign[0]}, which its log does not name: files of two runs are mixed; move it away, or copy the "
            "whole folder again to a place where nothing is"
        )


def _newest_state(
    store: Path, names: set[str], open_state: Callable[[Path], xr.DataTree]
) -> xr.DataTree | None:
    for _ in range(5):
        states = sorted((name for name in names if name.startswith(STATES)), key=number_of)
        if not states:
            return None
        try:
            with open_inside(store, states[-1]) as file:
                opened = open_state(store / states[-1])
                # It was opened once more, by its path: by then a link could have been there.
                if os.path.samestat(os.fstat(file.fileno()), (store / states[-1]).lstat()):
                    return opened
            opened.close()
        except (FileNotFoundError, SchemaError):
            if os.path.lexists(store / states[-1]):
                raise
        # Its writer has just removed it for a newer one.
        names, foreign = files_of(store)
        refuse_foreign(foreign)
    raise SchemaError("its files change faster than they can be opened; try again")


def status_of(store: Path, history: History, state_step: int | None) -> Status:
    """What a live store is at the moment; the step of its large arrays where they were looked at."""
    writer: dict[str, Any] = history.attempts[-1] if history.attempts else {"pid": 0, "host": ""}
    torn = history.torn
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


def _with_rows(run: xr.DataTree, history: History, status: Status, steps: np.ndarray) -> xr.DataTree:
    groups = {node.path.strip("/"): node.to_dataset(inherit=False) for node in run.subtree}
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
    try:
        opened = xr.DataTree.from_dict({f"/{path}": dataset for path, dataset in groups.items()})
    except ValueError:  # a group and a chain below it with unlike labels
        raise SchemaError("the groups of its rows do not fit to those of its saved arrays") from None
    opened.encoding.update(run.encoding)
    return opened


def _group_with_rows(path: str, known: xr.Dataset, history: History, steps: np.ndarray) -> xr.Dataset:
    """A group in which what has a step is of the rows, and the rest as in the saved state."""
    kept = known.drop_dims("step") if "step" in known.dims else known
    coords: dict[str, Any] = {"step": ("step", steps)}
    for name, fields in history.coords.items():
        group, _, label = name.rpartition("/")
        if group == path and label not in kept.variables:
            coords[label] = (fields["dims"], fields["values"], dict(fields["attrs"]))
    variables = {}
    for name, declared in history.variables.items():
        group, _, label = name.rpartition("/")
        if group == path:
            attrs = known[label].attrs if label in known.variables else dict(declared.attrs)
            lazy = indexing.LazilyIndexedArray(_Rows(history, name))
            variables[label] = xr.Variable(("step", *declared.dims), lazy, attrs)
    _require_fitting(path, kept, variables, coords)
    return kept.assign_coords(coords).assign(variables)


def _require_fitting(
    path: str, kept: xr.Dataset, variables: Mapping[str, xr.Variable], coords: Mapping[str, Any]
) -> None:
    """Refuse rows with other labels than the saved arrays, and two things of one name."""
    shapes = {label: (array.dims, array.shape) for label, array in variables.items()}
    shapes |= {label: (dims, values.shape) for label, (dims, values, *_) in coords.items() if label != "step"}
    all_dims = {*kept.sizes, *(dim for dims, _ in shapes.values() for dim in dims)}
    for label, (dims, shape) in shapes.items():
        if label in variables and (label in all_dims or label in kept.coords):
            raise SchemaError(f"{path}/{label} of its rows is a coordinate of its saved arrays")
        if label in coords and label in all_dims and dims != (label,):
            raise SchemaError(f"the coordinate {path}/{label} has the dims {dims}, expected {label}")
        for dim, size in zip(dims, shape, strict=True):
            if kept.sizes.get(dim, size) != size:
                raise SchemaError(
                    f"{path}/{label} of its rows has {size} labels of {dim}, its saved arrays have {kept.sizes[dim]}"
                )


class _Rows(BackendArray):
    """One variable of every row, read completely when a part of it is used."""

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
