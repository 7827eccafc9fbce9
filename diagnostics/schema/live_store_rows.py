"""Where are the numbers of the rows of a log? By the byte at which each begins: a log is in memory once, whatever it has."""

from __future__ import annotations

import math
import struct
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.schema.live_store_frames import Frame
from depthscope.diagnostics.schema.live_store_statements import Declared, time_of

ROW_HEAD = struct.Struct("<qdI")  # step, seconds since 1970, how many of the declared variables follow
LATER_HEAD = struct.Struct(
    "<qII"
)  # step, and from which of the declared variables to before which they come later

Cells = tuple[int | None, ...]
"""For each of the first dims without the step the number of one label, None for all of them."""


class LogRows:
    """The rows of a log, in the order of their steps; numbers that came later replace those of their row."""

    def __init__(self) -> None:
        self.steps, self.times = array("q"), array("d")
        self._starts, self._counts = (
            array("q"),
            array("q"),
        )  # of a row's numbers, and how many variables it has
        self._later = array("q")  # four each: start of the row, first and last variable, start of the numbers

    def __len__(self) -> int:
        return len(self.steps)

    def cut(self, at: int) -> None:
        """Forget the rows from one on."""
        for each in (self.steps, self.times, self._starts, self._counts):
            del each[at:]

    def add(self, content: bytes, frame: Frame, ends: Sequence[int]) -> None:
        """Take in a row, whose step is after those before."""
        step, time, count = ROW_HEAD.unpack_from(content, frame.start)
        start = frame.start + ROW_HEAD.size
        if count >= len(ends) or ends[count] != frame.end - start:
            raise InputError(f"the row of step {step} has {frame.end - start} bytes for {count} variables")
        self.times.append(time_of(time))
        self.steps.append(step)
        self._starts.append(start)
        self._counts.append(count)

    def add_later(self, content: bytes, frame: Frame, ends: Sequence[int]) -> int:
        """Take in numbers that came after their row; returns which row that is, or how many there are where it is gone."""
        step, first, last = LATER_HEAD.unpack_from(content, frame.start)
        start = frame.start + LATER_HEAD.size
        if not first < last < len(ends) or ends[last] - ends[first] != frame.end - start:
            raise InputError(
                f"{frame.end - start} bytes came later for variables {first} to {last} of step {step}"
            )
        at = bisect_left(self.steps, step)
        if at < len(self) and self.steps[at] == step:
            self._later.extend((self._starts[at], first, last, start))
            return at
        return len(self)

    def _later_numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """For each of them its row and (first, last, start), without those of rows that were superseded."""
        table = np.array(self._later, dtype=np.int64).reshape(-1, 4)
        starts = np.array(self._starts, dtype=np.int64)
        at = np.searchsorted(starts, table[:, 0])
        there = at < len(starts)
        there[there] = starts[at[there]] == table[there, 0]
        return at[there], table[there, 1:]

    def counts(self) -> np.ndarray:
        """How many variables each row has, with those that came later."""
        found = np.array(self._counts, dtype=np.int64)
        at, later = self._later_numbers()
        np.maximum.at(found, at, later[:, 1])
        return found

    def fill(
        self,
        found: np.ndarray,
        content: bytes,
        declared: Declared,
        place: int,
        ends: Sequence[int],
        chosen: tuple,
    ) -> None:
        """Write the cells of one variable of the last rows into ``found``, which has as many rows."""
        first = len(self) - len(found)
        dtype, shape = declared.numpy_dtype, declared.shape
        inner = dtype.itemsize * np.cumprod((1, *shape[:0:-1]))[::-1] if shape else ()
        for start, stop, offset, stride in self._stretches(first, place):
            table = np.ndarray(
                (stop - start, *shape), dtype, content, offset + ends[place], (stride, *map(int, inner))
            )
            found[start - first : stop - first] = table[(slice(None), *chosen)]
        rows, later = self._later_numbers()
        here = (rows >= first) & (later[:, 0] <= place) & (place < later[:, 1])
        for at, (begin, _, offset) in zip(rows[here].tolist(), later[here].tolist(), strict=True):
            values = np.frombuffer(content, dtype, math.prod(shape), offset + ends[place] - ends[begin])
            found[at - first] = values.reshape(shape)[chosen]

    def _stretches(self, first: int, place: int) -> list[tuple[int, int, int, int]]:
        """Rows that have a variable and begin at equal distances: the first, the one after the last, start and distance."""
        starts, counts = np.array(self._starts[first:]), np.array(self._counts[first:])
        if not len(starts):
            return []
        known = counts > place
        gaps = np.diff(starts)
        breaks = known[1:] != known[:-1]
        breaks[1:] |= gaps[1:] != gaps[:-1]
        bounds = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(starts)]
        return [
            (first + begin, first + end, int(starts[begin]), int(gaps[begin]) if end - begin > 1 else 0)
            for begin, end in pairwise(bounds)
            if known[begin]
        ]

    def row(
        self, content: bytes, at: int, variables: Sequence[Declared], ends: Sequence[int]
    ) -> tuple[int, bytes]:
        """How many variables one row has, with what came later, and its numbers; NaN where there are none."""
        rows, later = self._later_numbers()
        later = later[rows == at]
        start, count = self._starts[at], self._counts[at]
        number = max([count, *later[:, 1].tolist()])
        missing = [np.full(of.shape, math.nan, of.numpy_dtype).tobytes() for of in variables[count:number]]
        data = bytearray(content[start : start + ends[count]] + b"".join(missing))
        for first, last, offset in later.tolist():
            data[ends[first] : ends[last]] = content[offset : offset + ends[last] - ends[first]]
        return number, bytes(data)

    def payload(self, content: bytes, at: int, variables: Sequence[Declared], ends: Sequence[int]) -> bytes:
        """One row as it is in a log, with what came later."""
        number, data = self.row(content, at, variables, ends)
        return ROW_HEAD.pack(self.steps[at], self.times[at], number) + data
