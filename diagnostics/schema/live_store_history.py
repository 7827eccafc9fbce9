"""What happened in a live store? The frames of its log, replayed: variables, rows, attempts, and where older rows are.

A row supersedes earlier rows of the same step and of later ones, and so does the note that a training was resumed at a step:
what is left is the history of the training that goes on, with no step twice.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.schema.attributes import json_default
from depthscope.diagnostics.schema.limits import MAX_FILES, MAX_GROUPS, MAX_VARIABLES, Limit
from depthscope.diagnostics.schema.live_store_columns import OlderRows
from depthscope.diagnostics.schema.live_store_files import LOG, NUMBERED, open_inside
from depthscope.diagnostics.schema.live_store_frames import (
    BEGIN,
    DECLARE,
    MAX_PAYLOAD,
    NOTE,
    ROW,
    Frame,
    frames_from,
    is_damaged,
)
from depthscope.diagnostics.schema.live_store_rows import ROW_HEAD, Cells, LogRows
from depthscope.diagnostics.schema.live_store_statements import (
    MAX_JSON,
    Declared,
    attempt_of,
    attributes_of,
    coordinate_of,
    created_of,
    declared_of,
    is_count,
    parsed,
    step_of,
)
from depthscope.diagnostics.schema.validation import SchemaError

FORMAT, VERSION = "depthscope live run", 2
NUMBERS_THAT_CAME_LATER = 5
"""A kind of frame that earlier versions wrote."""
MAX_LOG = 1 << 30
"""Bytes; the writer begins a new log long before."""

_RUN = re.compile(r"[0-9a-f]{32}")


class History:
    """What the frames of a log add up to.

    ``store``: the folder that the older rows are in.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self.run = self.created = ""
        self.variables: dict[str, Declared] = {}
        self.coords: dict[str, dict[str, Any]] = {}
        self.attrs: dict[str, dict[str, Any]] = {}
        self.attempts: list[dict[str, Any]] = []
        self.finished = False
        self.files: set[str] = set()  # that the run has written, by their paths below the store
        self.older: list[OlderRows] = []
        # Files of columns that the log begins with; it may supersede some later.
        self.begun: frozenset[str] = frozenset()
        self.rows = LogRows()
        self.ends = [0]  # where in a row each variable begins, and the last one ends: bytes
        self.content, self.end, self.checksum = b"", 0, 0  # the log, and up to where it was replayed
        self._places: dict[str, int] = {}
        self._sizes: dict[tuple[str, str], int] = {}  # by group and dim
        self._text: dict[tuple[str, str], int] = {}  # bytes of JSON by group and attribute
        self._num_text = 0  # of all that is in memory

    @property
    def num_older(self) -> int:
        """How many rows are in files of columns."""
        return sum(part.num_rows for part in self.older)

    @property
    def num_rows(self) -> int:
        """Of all steps."""
        return self.num_older + len(self.rows)

    @property
    def last_step(self) -> int | None:
        """Of the last row; None where there is none."""
        if len(self.rows):
            return self.rows.steps[-1]
        return self.older[-1].last if self.older else None

    @property
    def last_time(self) -> float | None:
        """When the last row was written, in seconds since 1970; else when the last attempt began."""
        if len(self.rows):
            return self.rows.times[-1]
        if self.older:  # the last file alone
            return float(self.older[-1].times[self.older[-1].num_rows - 1])
        return self.attempts[-1]["time"] if self.attempts else None

    @property
    def torn(self) -> int:
        """Bytes after the last frame of the log, of one whose writer died or is writing it."""
        return len(self.content) - self.end

    def steps(self) -> np.ndarray:
        """The step of every row."""
        parts = [part.steps[: part.num_rows] for part in self.older]
        return np.concatenate([*parts, np.array(self.rows.steps, dtype=np.int64)])

    def times(self) -> np.ndarray:
        """Seconds since 1970 at which each row was written."""
        parts = [part.times[: part.num_rows] for part in self.older]
        return np.concatenate([*parts, np.array(self.rows.times)])

    def values(self, name: str, cells: Cells = (), *, start: int = 0, dtype: Any = None) -> np.ndarray:
        """One variable of every row from one on, rows first; NaN in rows that do not have it."""
        declared, place = self.variables[name], self._places[name]
        chosen = tuple(slice(None) if cell is None else cell for cell in cells)
        shape = [
            size for size, cell in zip(declared.shape, (*cells, *[None] * 64), strict=False) if cell is None
        ]
        found = np.full((self.num_rows - start, *shape), math.nan, dtype or declared.dtype)
        at = -start  # of the first row of a part, in `found`
        for part in self.older:
            first, end = max(-at, 0), at + part.num_rows
            if end > 0 and place < part.num_variables:
                values = part.values(place, self.ends[place], declared.numpy_dtype, declared.shape)
                found[at + first : end] = values[(slice(first, None), *chosen)]
            at = end
        if 0 not in declared.shape:
            self.rows.fill(found[max(at, 0) :], self.content, declared, place, self.ends, chosen)
        return found

    def row(self, position: int) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """Dims and values of all variables that one row has."""
        for part in self.older:
            if position < part.num_rows:
                return {
                    name: (of.dims, part.values(place, self.ends[place], of.numpy_dtype, of.shape)[position])
                    for place, (name, of) in enumerate(self.variables.items())
                    if place < part.num_variables
                }
            position -= part.num_rows
        number, data = self.rows.row(self.content, position, self.ends)
        return {
            name: (of.dims, np.frombuffer(data[begin:end], of.numpy_dtype).reshape(of.shape))
            for (name, of), begin, end in zip(
                list(self.variables.items())[:number], self.ends, self.ends[1:], strict=False
            )
        }

    def check_size(self, max_bytes: int | None = None) -> None:
        """Refuse rows that need far more memory than their files have bytes."""
        stored = len(self.content) + sum(part.num_bytes for part in self.older)
        Limit.of(stored, max_bytes).check(self.num_rows * self.ends[-1])

    def forget_rows(self) -> None:
        """Drop the log and its rows from memory: a writer needs what is declared and noted alone."""
        self.rows, self.content = LogRows(), b""

    # --- what is declared and noted

    def require_declarable(self, variables: Mapping[str, Declared], coords: Mapping[str, Any]) -> None:
        """Refuse variables and coordinates that do not fit to each other, to the known ones, or into a row."""
        if len(self.variables) + len(self.coords) + len(variables) + len(coords) > MAX_VARIABLES:
            raise InputError(f"more than {MAX_VARIABLES} variables")
        if self.ends[-1] + sum(declared.num_bytes for declared in variables.values()) > MAX_PAYLOAD:
            raise InputError(f"a row of more than {MAX_PAYLOAD} bytes")
        sizes = dict(self._sizes)
        for name, dims, shape in _shapes(variables, coords):
            group = name.rpartition("/")[0]
            if name in self.variables or name in self.coords or (name in variables and name in coords):
                raise InputError(f"{name} is declared twice")
            for dim, size in zip(dims, shape, strict=True):
                if sizes.setdefault((group, dim), size) != size:
                    raise InputError(
                        f"{dim} of {name} has {size} labels, expected {sizes[group, dim]} as in /{group}"
                    )

    def declare(self, variables: Mapping[str, Declared], coords: Mapping[str, Any]) -> None:
        """Add variables, which are the last ones of a row from now on, and coordinates."""
        for name, declared in variables.items():
            self._places[name] = len(self.variables)
            self.variables[name] = declared
            self.ends.append(self.ends[-1] + declared.num_bytes)
        self.coords.update(coords)
        for name, dims, shape in _shapes(variables, coords):
            self._sizes.update(zip(((name.rpartition("/")[0], dim) for dim in dims), shape, strict=True))

    def require_text(self, num_bytes: int) -> None:
        """Refuse more JSON than may be in memory."""
        if self._num_text + num_bytes > MAX_JSON:
            raise InputError(f"more than {MAX_JSON} bytes of declarations and attributes")

    def take_note(self, content: Mapping[str, Any]) -> None:
        """Take in one note: ``opened``, ``resumed``, ``finished``, ``attributes`` or ``file``."""
        kind = content["note"]
        if kind == "opened":
            self.attempts.append(attempt_of(content))
            self.finished = False
        elif kind == "resumed":
            step, before = step_of(content["step"]), self.num_rows
            self._supersede(step)
            self.attempts[-1]["resumed"] = [{"step": step, "superseded": before - self.num_rows}]
        elif kind == "finished":
            self.finished = True
        elif kind == "attributes":
            for path, attrs in content["attrs"].items():
                self._take_attributes(path, attributes_of(path, attrs))
        elif kind == "file":
            self._take_file(content["name"])
        else:
            raise InputError(f"a note of the kind {kind!r}")

    def _take_attributes(self, path: str, attrs: Mapping[str, Any]) -> None:
        for name, value in attrs.items():
            size = len(name) + len(json.dumps(value, default=json_default))
            self._num_text += size - self._text.get((path, name), 0)
            self._text[path, name] = size
        self.require_text(0)
        self.attrs[path] = attributes_of(path, {**self.attrs.get(path, {}), **attrs})
        if len(self.attrs) > MAX_GROUPS:
            raise InputError(f"attributes of more than {MAX_GROUPS} groups")

    def _take_file(self, name: Any) -> None:
        if not isinstance(name, str) or not NUMBERED.fullmatch(name):
            raise InputError(f"{name!r} is not a file of a live store")
        self.files.add(name)
        if len(self.files) > MAX_FILES:
            raise InputError(f"more than {MAX_FILES} files")

    def _supersede(self, step: int) -> None:
        """Forget the rows of a step and of later ones."""
        self.rows.cut(bisect_left(self.rows.steps, step))
        while self.older and self.older[-1].last >= step:
            part = self.older[-1]
            kept = int(np.searchsorted(part.steps[: part.num_rows], step)) if part.first < step else 0
            if kept:
                part.num_rows, part.last = kept, int(part.steps[kept - 1])
                return
            self.older.pop()

    def begin_frame(self) -> dict[str, Any]:
        """What a new log begins with: everything but the rows of the former one."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "run": self.run,
            "created": self.created,
            "columns": [
                [
                    part.number,
                    part.size,
                    part.num_variables,
                    part.checksum,
                    part.num_rows,
                    part.first,
                    part.last,
                ]
                for part in self.older
            ],
            "files": sorted(self.files),
            "attempts": self.attempts,
            "finished": self.finished,
            "variables": {name: declared.as_dict() for name, declared in self.variables.items()},
            "coords": self.coords,
            "attrs": self.attrs,
        }

    # --- replaying

    def replay(self, added: bytes) -> None:
        """Take in what follows in the log.

        Raises SchemaError, in one sentence, for frames that depthscope does not write.
        """
        self.content = self.content[: self.end] + added
        try:
            for frame in frames_from(self.content, self.end, self.checksum):
                if (frame.kind == BEGIN) != (self.end == 0):
                    raise InputError(f"a frame of kind {frame.kind} at byte {self.end}")
                self._take(frame)
                self.end, self.checksum = frame.end, frame.checksum
        except SchemaError:
            raise
        except (
            AttributeError,
            IndexError,
            KeyError,
            OverflowError,
            RecursionError,
            TypeError,
            ValueError,
            struct.error,
        ) as error:
            raise SchemaError(
                f"its {LOG} is none that depthscope writes ({type(error).__name__}: {error})"
            ) from None

    def _take(self, frame: Frame) -> None:
        if frame.kind == ROW:
            last, step = self.last_step, ROW_HEAD.unpack_from(self.content, frame.start)[0]
            if last is not None and step <= last:
                self._supersede(step)
            self.rows.add(self.content, frame, self.ends)
            return
        if frame.kind == NUMBERS_THAT_CAME_LATER:
            raise SchemaError(
                "its row log has metrics that a second process added (analysis='process' of an earlier depthscope); "
                "save it as a file with that depthscope"
            )
        content = parsed(self.content[frame.start : frame.end])
        if frame.kind == BEGIN:
            self._begin(content, frame.end - frame.start)
        elif frame.kind == DECLARE:
            self.require_text(frame.end - frame.start)
            self._num_text += frame.end - frame.start
            self._declare(content)
        elif frame.kind == NOTE:
            self.take_note(content)
        else:
            raise InputError(f"a frame of kind {frame.kind}")

    def _begin(self, content: Mapping[str, Any], num_bytes: int) -> None:
        if content["format"] != FORMAT or not is_count(content["version"]):
            raise InputError(f"its format is {content['format']!r}, expected {FORMAT!r}")
        if content["version"] > VERSION:
            raise SchemaError(
                f"its row log has version {content['version']}, this depthscope reads version {VERSION}; "
                "read it with a newer depthscope"
            )
        self.run, self.created = content["run"], created_of(content["created"])
        if not _RUN.fullmatch(self.run):
            raise InputError(f"the run's id is {self.run!r}, expected 32 hexadecimal digits")
        self._declare(content)
        self.attempts = [attempt_of(fields) for fields in content["attempts"]]
        self.finished = content["finished"] is True
        self.take_note({"note": "attributes", "attrs": content["attrs"]})
        self._num_text = num_bytes
        for name in content["files"]:
            self._take_file(name)
        for fields in content["columns"]:
            self._take_older(*fields)
        self.begun = frozenset(part.name for part in self.older)

    def _take_older(
        self, number: int, size: int, num_variables: int, checksum: int, num_rows: int, first: int, last: int
    ) -> None:
        before = self.older[-1].last if self.older else -(1 << 63) - 1
        counts = (number, size, num_variables, checksum, num_rows)
        if not all(map(is_count, counts)) or not 0 < num_rows <= size or number >= 1 << 32 or size >= 1 << 32:
            raise InputError(f"a file of columns is described as {counts}")
        if not before < step_of(first) <= step_of(last) or num_variables >= len(self.ends):
            raise InputError(f"file {number} has {num_variables} variables and the steps {first} to {last}")
        row_bytes = self.ends[num_variables]
        self.older.append(
            OlderRows(
                self.store, self.run, number, size, num_variables, row_bytes, checksum, num_rows, first, last
            )
        )
        if len(self.older) > MAX_FILES or self.older[-1].name not in self.files:
            raise InputError(f"{self.older[-1].name} is not among its files")

    def _declare(self, content: Mapping[str, Any]) -> None:
        variables = {name: declared_of(name, fields) for name, fields in content["variables"].items()}
        coords = {name: coordinate_of(name, fields) for name, fields in content["coords"].items()}
        known = {name for name in variables if self.variables.get(name) == variables[name]}
        for name in known:  # a writer that was interrupted between writing and knowing declares once more
            del variables[name]
        self.require_declarable(variables, coords)
        self.declare(variables, coords)


def _shapes(
    variables: Mapping[str, Declared], coords: Mapping[str, Any]
) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    return [
        *((name, of.dims, of.shape) for name, of in variables.items()),
        *((name, of["dims"], of["values"].shape) for name, of in coords.items()),
    ]


def read_history(store: Path, *, despite_damage: bool = False) -> History:
    """Read the log of a store; with ``despite_damage`` what is before the damage, where there is some.

    Raises SchemaError for a damaged or foreign log, and OSError where there is none.
    """
    history = History(store)
    with open_inside(store, LOG) as file:
        content = rest_of(file)
    if content.startswith(b"DSr1"):
        raise SchemaError(
            "its row log has version 1, in which files of another run go unnoticed; open it with the depthscope that wrote "
            "it, and save it as a file"
        )
    history.replay(content)
    if not history.end:
        raise SchemaError(
            f"its {LOG} is damaged at its first byte, or of another program; nothing of it can be read"
        )
    if not despite_damage:
        refuse_damage(history)
    return history


def rest_of(log: IO[bytes], start: int = 0) -> bytes:
    """What an opened log has from a byte on at this moment."""
    size = os.fstat(log.fileno()).st_size
    if size > MAX_LOG:
        raise SchemaError(f"its row log has more than {MAX_LOG} bytes; depthscope writes no such log")
    log.seek(start)
    return log.read(max(0, size - start))


def refuse_damage(history: History) -> None:
    """Refuse a log in which frames follow after bytes that are none, or after frames that are missing."""
    if not history.torn or not is_damaged(history.content, history.end):
        return
    raise SchemaError(f"its {LOG} is damaged at byte {history.end}, in row {history.num_rows}")
