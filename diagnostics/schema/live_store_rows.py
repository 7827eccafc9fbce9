"""Where are the numbers of the rows of a log? By the byte at which each begins: a log is in memory once, whatever it has."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.schema.live_store_frames import Frame
from depthscope.diagnostics.schema.live_store_statements import Declared, time_of

ROW_HEAD = struct.Struct("<qdI")  # step, seconds since 1970, how many of the declared variables follow

Cells = tuple[int | None, ...]
"""For each of the first dims without the step the number of one label, None for all of them."""


class LogRows:
    """The rows of a log, in the order of their steps."""

    def __init__(self) -> None:
        self.steps, self.times = array("q"), array("d")
        self._starts, self.counts = (
            array("q"),
            array("q"),
        )  # of a row's numbers, and how many variables it has

    def __len__(self) -> int:
        return len(self.steps)

    def cut(self, at: int) -> None:
        """Forget the rows from one on."""
        for each in (self.steps, self.times, self._starts, self.counts):
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
        self.counts.append(count)

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

    def _stretches(self, first: int, place: int) -> list[tuple[int, int, int, int]]:
        """Rows that have a variable and begin at equal distances: the first, the one after the last, start and distance."""
        starts, counts = np.array(self._starts[first:]), np.array(self.counts[first:])
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

    def row(self, content: bytes, at: int, ends: Sequence[int]) -> tuple[int, bytes]:
        """How many variables one row has, and its numbers."""
        start, count = self._starts[at], self.counts[at]
        return count, content[start : start + ends[count]]
