"""What does the live row of a step take? Its numbers alone: all else is that of the row before, where it is equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from depthscope.probes.training.live.row import LiveRow, Number, Numbers

ROWS_AT_ONCE = 128  # whose memory is taken together: small arrays between others would leave gaps


class _Layout(dict[str, tuple[Any, ...]]):
    """Dims, shape, begin, end and attributes by path, for rows that have the same, and the memory of their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._block, self._used = np.zeros((0, 0)), 0

    def room(self, size: int) -> np.ndarray:
        """Memory for the numbers of one more row."""
        if self._used == len(self._block):
            self._block, self._used = np.empty((ROWS_AT_ONCE, size)), 0
        self._used += 1
        return self._block[self._used - 1]


class _Packed(Mapping[str, Number]):
    """The numbers of one row, by their paths."""

    __slots__ = ("_values", "layout")

    def __init__(self, layout: _Layout, values: np.ndarray):
        self.layout, self._values = layout, values

    def __getitem__(self, path: str) -> Number:
        dims, shape, start, stop, attrs = self.layout[path]
        return dims, self._values[start:stop].reshape(shape), attrs

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)


def packed(row: LiveRow, before: LiveRow | None) -> LiveRow:
    """A row that takes little more than its numbers next to the one before."""
    own, start = _Layout(), 0
    known = before.numbers.layout if before is not None and isinstance(before.numbers, _Packed) else _Layout()
    for path, (dims, values, attrs) in row.numbers.items():
        place = tuple(dims), values.shape, start, start + values.size, attrs
        own[path] = known[path] if _is_same(place, known.get(path)) else place
        start += values.size
    is_known = len(own) == len(known) and all(place is known[path] for path, place in own.items())
    layout = known if is_known else own
    values = layout.room(start)
    for path, (_, _, begin, end, _) in layout.items():
        values[begin:end] = np.ravel(row.numbers[path][1])
    found = replace(row, numbers=_Packed(layout, values))
    if before is None:
        return found
    return replace(
        found,
        coords=before.coords if _are_same(row.coords, before.coords) else row.coords,
        not_computed=before.not_computed if row.not_computed == before.not_computed else row.not_computed,
    )


def _is_same(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except ValueError:  # of arrays
        return False


def _are_same(ones: Numbers, others: Numbers) -> bool:
    return ones.keys() == others.keys() and all(
        a[0] == b[0]
        and a[1].dtype == b[1].dtype
        and (a[1] is b[1] or np.array_equal(a[1], b[1], equal_nan=a[1].dtype.kind == "f"))
        and _is_same(a[2], b[2])
        for a, b in ((ones[path], others[path]) for path in ones)
    )
