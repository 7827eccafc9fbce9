"""What happened in a live store? The frames of its log, replayed: variables, rows, attempts, and where older rows are.

A row supersedes earlier rows of the same step and of later ones, and so does the note that a training was resumed at a step:
what is left is the history of the training that goes on, with no step twice.
"""

from __future__ import annotations

import json
import math
import re
import struct
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from depthscope.diagnostics.schema.attributes import json_default
from depthscope.diagnostics.schema.groups import GROUPS
from depthscope.diagnostics.schema.limits import MAX_FILES, MAX_TEXT, MAX_VARIABLES
from depthscope.diagnostics.schema.live_store_columns import STEP, TIME, ColumnFile, is_count, read_index
from depthscope.diagnostics.schema.live_store_files import COLUMNS, LOG, open_inside
from depthscope.diagnostics.schema.live_store_frames import (
    BEGIN,
    DECLARE,
    LATER,
    NOTE,
    ROW,
    Frame,
    Scan,
    packed,
    scan,
)
from depthscope.diagnostics.schema.validation import SchemaError

FORMAT, VERSION = "depthscope live run", 1
ROW_HEAD = struct.Struct("<qdI")  # step, seconds since 1970, how many of the declared variables follow
LATER_HEAD = struct.Struct(
    "<qII"
)  # step, and from which of the declared variables to before which they come later
MAX_LOG = 1 << 30
"""Bytes; the writer begins a new log long before."""

# A group, perhaps a chain, and the variable.
_NAME = re.compile(rf"({'|'.join(GROUPS)})(/[^/\x00]{{1,200}}){{1,2}}")


@dataclass(frozen=True)
class Declared:
    """A variable that has one value a step.

    Parameters
    ----------
    dims : tuple of str
        Without the step.
    shape : tuple of int
        Of one step.
    dtype : str
        ``"<f8"`` or ``"<f4"``.
    attrs : mapping
        Of the variable.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype, made once: a row is written every few milliseconds."""
        return np.dtype(self.dtype)

    @property
    def num_bytes(self) -> int:
        """Of one step."""
        return math.prod(self.shape) * int(self.dtype[-1])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"dims": self.dims, "shape": self.shape, "dtype": self.dtype, "attrs": dict(self.attrs)}


@dataclass(frozen=True)
class Row:
    """The numbers of one step, in the order in which the variables were declared."""

    step: int
    time: float
    num_variables: int
    data: bytes

    def frame(self) -> bytes:
        """As it is in a log."""
        return packed(ROW, ROW_HEAD.pack(self.step, self.time, self.num_variables) + self.data)


@dataclass
class OlderRows:
    """The first rows of a file of columns."""

    number: int
    file: ColumnFile
    steps: np.ndarray
    num_rows: int


@dataclass
class History:
    """What the frames of a log add up to."""

    created: str = ""
    variables: dict[str, Declared] = field(default_factory=dict)
    coords: dict[str, Any] = field(default_factory=dict)
    attrs: dict[str, dict[str, Any]] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    older: list[OlderRows] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    ends: list[int] = field(default_factory=lambda: [0])
    """Where in a row each variable begins, and the last one ends: bytes."""
    _tables: list[tuple[int, np.ndarray]] | None = None
    begun: frozenset[int] = frozenset()
    """The files of columns that the log itself names, some of which it may have superseded since."""

    @property
    def num_rows(self) -> int:
        """Of all steps."""
        return sum(part.num_rows for part in self.older) + len(self.rows)

    @property
    def last_step(self) -> int | None:
        """Of the last row; None where there is none."""
        if self.rows:
            return self.rows[-1].step
        return int(self.older[-1].steps[self.older[-1].num_rows - 1]) if self.older else None

    @property
    def last_time(self) -> float | None:
        """When the last row was written, in seconds since 1970; else when the last attempt began."""
        if self.rows:
            return self.rows[-1].time
        if self.older:
            times = self.older[-1].file.read(TIME)
            return None if times is None else float(times[self.older[-1].num_rows - 1])
        return self.attempts[-1]["time"] if self.attempts else None

    def steps(self) -> np.ndarray:
        """The step of every row."""
        parts = [part.steps[: part.num_rows] for part in self.older]
        return np.concatenate([*parts, np.array([row.step for row in self.rows], dtype=np.int64)])

    def values(self, name: str) -> np.ndarray:
        """One variable of every row; NaN in rows that do not have it.

        Parameters
        ----------
        name : str
            Of the variable.

        Returns
        -------
        ndarray
        """
        declared = self.variables[name]
        found = np.full((self.num_rows, *declared.shape), math.nan, declared.dtype)
        start = 0
        for part in self.older:
            values = part.file.read(name)
            if values is not None:
                if values.dtype != found.dtype or values.shape[1:] != declared.shape:
                    raise SchemaError(
                        f"{part.file.path}: {name} is no {declared.dtype} of shape {declared.shape}"
                    )
                found[start : start + part.num_rows] = values[: part.num_rows]
            start += part.num_rows
        place = list(self.variables).index(name)
        for num_variables, table in self._row_tables():
            if place < num_variables:
                cells = np.ascontiguousarray(table[:, self.ends[place] : self.ends[place + 1]])
                shape = (len(table), *declared.shape)
                found[start : start + len(table)] = cells.view(declared.dtype).reshape(shape)
            start += len(table)
        return found

    def _row_tables(self) -> list[tuple[int, np.ndarray]]:
        """The rows of the log as bytes, one table for each stretch of rows with the same number of variables."""
        if self._tables is None:
            self._tables = []
            for num_variables, rows in groupby(self.rows, key=lambda row: row.num_variables):
                data = [row.data for row in rows]
                table = np.frombuffer(b"".join(data), np.uint8).reshape(len(data), self.ends[num_variables])
                self._tables.append((num_variables, table))
        return self._tables

    def add_variable(self, name: str, declared: Declared) -> None:
        """Add a variable, which is the last one of a row from now on.

        Parameters
        ----------
        name : str
            A group, perhaps a chain, and the variable.
        declared : Declared
            What it is.
        """
        self.variables[name] = declared
        self.ends.append(self.ends[-1] + declared.num_bytes)

    def supersede(self, step: int) -> int:
        """Forget the rows of a step and of later ones.

        Parameters
        ----------
        step : int
            The first one.

        Returns
        -------
        int
            How many rows these were.
        """
        before, self._tables = self.num_rows, None
        del self.rows[bisect_left(self.rows, step, key=lambda row: row.step) :]
        for part in reversed(self.older):
            if part.steps[part.num_rows - 1] < step:
                break
            part.num_rows = int(np.searchsorted(part.steps[: part.num_rows], step))
        self.older = [part for part in self.older if part.num_rows]
        return before - self.num_rows

    def begin_frame(self) -> bytes:
        """What a new log begins with: everything but the rows of the former one."""
        return json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "created": self.created,
                "columns": [[part.number, part.num_rows] for part in self.older],
                "attempts": self.attempts,
                "finished": self.finished,
                "variables": {name: declared.as_dict() for name, declared in self.variables.items()},
                "coords": self.coords,
                "attrs": self.attrs,
            },
            default=json_default,
        ).encode()

    # --- replaying

    def replay(self, frames: Iterable[Frame], store: Path, *, first: int = 0) -> None:
        """Take in what the frames of a log say.

        Parameters
        ----------
        frames : iterable of Frame
            In their order.
        store : Path
            The folder that the older rows are in.
        first : int
            Number of the first of these frames in the log: above 0 where those before it were taken in already.
        """
        self._tables = None
        for number, frame in enumerate(frames, start=first):
            if (frame.kind == BEGIN) != (number == 0):
                raise ValueError(f"frame {number} is of kind {frame.kind}")
            if frame.kind in (ROW, LATER):
                take = self._take_row if frame.kind == ROW else self._take_later
                take(frame.payload)
                continue
            if len(frame.payload) > MAX_TEXT:
                raise ValueError(f"{len(frame.payload)} bytes of JSON, expected at most {MAX_TEXT}")
            content = json.loads(bytes(frame.payload))
            if frame.kind == BEGIN:
                self._begin(content, store)
            elif frame.kind == DECLARE:
                self._declare(content)
            elif frame.kind == NOTE:
                self.take_note(content)

    def _begin(self, content: Any, store: Path) -> None:
        if content["format"] != FORMAT or not is_count(content["version"]):
            raise ValueError(f"its format is {content['format']!r}, expected {FORMAT!r}")
        if content["version"] > VERSION:
            raise SchemaError(
                f"its row log has version {content['version']}, this depthscope reads up to {VERSION}; "
                "read it with a newer depthscope"
            )
        self.created = str(content["created"])
        self._declare(content)
        for attempt in content["attempts"]:
            self.take_note({"note": "opened", **attempt})
        self.finished = content["finished"] is True
        self.take_note({"note": "attributes", "attrs": content["attrs"]})
        self._take_older(content["columns"], store)

    def _take_older(self, parts: Any, store: Path) -> None:
        if len(parts) > MAX_FILES:
            raise ValueError(f"{len(parts)} files of columns, expected at most {MAX_FILES}")
        last = -1
        for number, num_rows in parts:
            if not (is_count(number) and is_count(num_rows) and num_rows):
                raise ValueError(f"file {number!r} with {num_rows!r} rows")
            file = read_index(columns_path(store, number))
            steps = file.read(STEP)
            if (
                steps is None
                or len(steps) < num_rows
                or steps[0] <= last
                or (np.diff(steps[:num_rows]) <= 0).any()
            ):
                raise ValueError(f"the steps of {file.path.name} do not follow those before")
            last = int(steps[num_rows - 1])
            self.older.append(OlderRows(number, file, steps, num_rows))
        self.begun = frozenset(part.number for part in self.older)

    def _declare(self, content: Any) -> None:
        for name, fields in content["variables"].items():
            declared = Declared(
                tuple(fields["dims"]), tuple(fields["shape"]), fields["dtype"], dict(fields["attrs"])
            )
            require_declarable(name, declared)
            known = self.variables.get(name)
            if known is None:
                self.add_variable(name, declared)
            elif known != declared:
                raise ValueError(f"{name} is declared twice, as {known} and as {declared}")
        for name, fields in content["coords"].items():
            if not _NAME.fullmatch(name) or not all(isinstance(dim, str) for dim in fields["dims"]):
                raise ValueError(f"the coordinate {name!r} is {fields!r}")
            self.coords[name] = {key: fields[key] for key in ("dims", "values", "attrs")}
        if len(self.variables) + len(self.coords) > MAX_VARIABLES:
            raise ValueError(f"more than {MAX_VARIABLES} variables")

    def take_note(self, content: Any) -> None:
        """Take in one note.

        Parameters
        ----------
        content : dict
            Its ``note`` is ``opened``, ``resumed``, ``finished`` or ``attributes``.
        """
        kind = content["note"]
        if kind == "opened":
            attempt = {key: content[key] for key in ("time", "pid", "host")}
            self.attempts.append(
                {**attempt, "time": float(attempt["time"]), "resumed": content.get("resumed", [])}
            )
            self.finished = False
        elif kind == "resumed":
            superseded = self.supersede(int(content["step"]))
            self.attempts[-1]["resumed"] = [{"step": int(content["step"]), "superseded": superseded}]
        elif kind == "finished":
            self.finished = True
        elif kind == "attributes":
            for path, attrs in content["attrs"].items():
                self.attrs.setdefault(path, {}).update(attrs)

    def _take_row(self, payload: memoryview) -> None:
        step, time, num_variables = ROW_HEAD.unpack_from(payload)
        data = bytes(payload[ROW_HEAD.size :])
        if num_variables > len(self.variables) or self.ends[num_variables] != len(data):
            raise ValueError(f"the row of step {step} has {len(data)} bytes for {num_variables} variables")
        last = self.last_step
        if last is not None and step <= last:
            self.supersede(step)
        self.rows.append(Row(step, time, num_variables, data))

    def _take_later(self, payload: memoryview) -> None:
        """Put variables that were computed after their row was written into it, unless it was superseded meanwhile."""
        step, first, last = LATER_HEAD.unpack_from(payload)
        at = bisect_left(self.rows, step, key=lambda row: row.step)
        if at == len(self.rows) or self.rows[at].step != step:
            return
        row, data = self.rows[at], bytes(payload[LATER_HEAD.size :])
        if not first < last < len(self.ends) or self.ends[last] - self.ends[first] != len(data):
            raise ValueError(f"{len(data)} bytes came later for variables {first} to {last} of step {step}")
        # Variables that were declared after the row are NaN in it so far.
        newer = list(self.variables.values())[row.num_variables : last]
        before = b"".join(
            [row.data, *(np.full(of.shape, math.nan, of.numpy_dtype).tobytes() for of in newer)]
        )
        whole = before[: self.ends[first]] + data + before[self.ends[last] :]
        self.rows[at] = Row(step, row.time, max(row.num_variables, last), whole)
        self._tables = None


def columns_path(store: Path, number: int) -> Path:
    """Where a file of columns is.

    Parameters
    ----------
    store : Path
        The folder.
    number : int
        Of the file.

    Returns
    -------
    Path
    """
    return store / COLUMNS / f"{number:06d}.cols"


def require_declarable(name: str, declared: Declared) -> None:
    """Refuse what no log may declare.

    Parameters
    ----------
    name : str
        Of the variable.
    declared : Declared
        What it is said to be.

    Raises
    ------
    ValueError
        For another group, unlike dims and shape, or another dtype.
    """
    dims = declared.dims
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a variable in {', '.join(GROUPS)}")
    if len(dims) != len(declared.shape) or len({*dims, STEP}) != len(dims) + 1:
        raise ValueError(f"{name} has the dims {dims} and the shape {declared.shape}")
    if not all(isinstance(dim, str) for dim in dims) or not all(map(is_count, declared.shape)):
        raise ValueError(f"{name} has the dims {dims} and the shape {declared.shape}")
    if declared.dtype not in ("<f8", "<f4"):
        raise ValueError(f"{name} has the dtype {declared.dtype!r}, expected <f8 or <f4")


def read_history(store: Path, *, despite_damage: bool = False) -> tuple[History, Scan]:
    """Read the log of a store.

    Parameters
    ----------
    store : Path
        The folder.
    despite_damage : bool
        Return what is before the damage, where there is some.

    Returns
    -------
    tuple of History and Scan

    Raises
    ------
    SchemaError
        For a damaged or foreign log.
    OSError
        Where there is none.
    """
    with open_inside(store / LOG) as file:
        content = file.read(MAX_LOG + 1)
    if len(content) > MAX_LOG:
        raise SchemaError(f"its row log has more than {MAX_LOG} bytes; depthscope writes no such log")
    found = scan(content)
    if not found.frames:
        raise SchemaError(
            f"its {LOG} is damaged at its first byte, or of another program; nothing of it can be read"
        )
    history = History()
    replay_or_refuse(history, found.frames, store)
    if not despite_damage:
        refuse_damage(history, found)
    return history, found


def replay_or_refuse(history: History, frames: Iterable[Frame], store: Path, *, first: int = 0) -> None:
    """Take in what frames say, and refuse in a sentence what depthscope does not write.

    Parameters
    ----------
    history : History
        Is changed.
    frames, store, first
        See `History.replay`.

    Raises
    ------
    SchemaError
        For frames of somebody else, and where a file of older rows is missing.
    """
    try:
        history.replay(frames, store, first=first)
    except SchemaError:
        raise
    except (
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        RecursionError,
        OverflowError,
        struct.error,
    ) as error:
        raise SchemaError(
            f"its {LOG} is none that depthscope writes ({type(error).__name__}: {error})"
        ) from None
    except FileNotFoundError as error:
        raise SchemaError(f"a file of its older rows is missing: {error.filename}") from None


def refuse_damage(history: History, found: Scan, *, before: int = 0) -> None:
    """Refuse a log in which whole frames follow after bytes that are none.

    Parameters
    ----------
    history : History
        What is before the damage.
    found : Scan
        Of the log, or of its end.
    before : int
        Bytes of the log before those that were scanned.

    Raises
    ------
    SchemaError
        Where there is damage.
    """
    if not found.damaged:
        return
    known = (
        f"the {history.num_rows} rows up to step {history.last_step} before it can be read with "
        "open_run(path, verify=False)"
        if history.num_rows
        else "no row is before it"
    )
    raise SchemaError(
        f"its {LOG} is damaged at byte {before + found.end}, in row {history.num_rows}; {known}"
    )
