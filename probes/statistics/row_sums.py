"""What does the row of a measured step take? One vector: what its numbers are is said once for all rows."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from depthscope.probes.statistics.token_sums import TokenSums, array_of


class _Place(NamedTuple):
    """Where one statistic is in a vector, at some depths or connections."""

    keys: tuple[int, ...]
    shape: tuple[int, ...]  # at each of them
    dtype: torch.dtype
    start: int


ROWS_AT_ONCE = 128  # whose memory is taken together: small tensors between others would leave gaps


class _Layout:
    """Where statistics are in the vectors of rows that have the same ones, and the memory of the next rows."""

    def __init__(self, places: dict[str, _Place], size: int, device: torch.device):
        self.places, self._size, self._device = places, size, device
        self._used, self._lock = 0, threading.Lock()
        # The rows own the memory: with the last row of a training it is given back.
        self._block: weakref.ref[torch.Tensor] | None = None

    def room(self) -> tuple[torch.Tensor, int]:
        """Memory for one more row: a block of them, and which of its rows."""
        with self._lock:
            block = None if self._block is None else self._block()
            if block is None or self._used == ROWS_AT_ONCE:
                block = torch.empty(ROWS_AT_ONCE, self._size, dtype=torch.float64, device=self._device)
                self._block, self._used = weakref.ref(block), 0
            self._used += 1
            return block, self._used - 1


_known: dict[tuple[Any, ...], _Layout] = {}  # of all trainings of the process: a few


class RowSums:
    """The statistics of one chain in one step, as `TokenSums.compact` has them; on the device until they are asked for."""

    __slots__ = ("_apart", "_block", "_layout", "_row")

    def __init__(self, compact: TokenSums):
        places: dict[str, _Place] = {}
        parts: list[torch.Tensor] = []
        # Of depths on several devices, or of several shapes.
        self._apart: dict[str, dict[int, torch.Tensor]] = {}
        start = 0
        for table in (compact.sums, compact.maxima, compact.latest):
            for name, values in table.items():
                tensors = list(values.values())
                if len({(value.shape, value.dtype, value.device) for value in tensors}) != 1 or (
                    parts and parts[0].device != tensors[0].device
                ):
                    self._apart[name] = values
                    continue
                parts.append(torch.stack(tensors).flatten().double())
                places[name] = _Place(tuple(values), tuple(tensors[0].shape), tensors[0].dtype, start)
                start += len(parts[-1])
        vector = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
        key = (*places.items(), vector.device)
        layout = _known.setdefault(key, _Layout(places, start, vector.device))
        self._layout, (self._block, self._row) = layout.places, layout.room()
        self._block[self._row] = vector

    def keys(self, name: str) -> Sequence[int]:
        """The depths or connections at which a statistic was added up."""
        place = self._layout.get(name)
        return tuple(self._apart.get(name, ())) if place is None else place.keys

    def array(self, name: str, keys: Sequence[int]) -> np.ndarray | None:
        """As `TokenSums.array`."""
        place = self._layout.get(name)
        if place is None:
            return array_of(self._apart.get(name, {}), keys)
        count = math.prod(place.shape) * len(place.keys)
        numbers = self._block[self._row, place.start : place.start + count].to(place.dtype)
        rows = numbers.reshape(len(place.keys), *place.shape)
        if tuple(keys) == place.keys:
            return rows.cpu().numpy()
        return array_of(dict(zip(place.keys, rows, strict=True)), keys)
