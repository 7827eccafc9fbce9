"""What does the row of a measured step take? One vector: what its numbers are is said once for all rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from depthscope.probes.statistics.token_sums import TokenSums, array_of


class _Place(NamedTuple):
    """Where one statistic is in a vector, at some depths or connections."""

    keys: tuple[int, ...]
    shape: tuple[int, ...]  # at each of them
    dtype: torch.dtype
    start: int


_Layout = dict[str, _Place]
_known: dict[tuple[tuple[str, _Place], ...], _Layout] = {}  # of all trainings of the process: a few


class RowSums:
    """The statistics of one chain in one step, as `TokenSums.compact` has them; on the device until they are asked for."""

    __slots__ = ("_apart", "_layout", "_vector")

    def __init__(self, compact: TokenSums):
        places: dict[str, _Place] = {}
        parts: list[torch.Tensor] = []
        self._apart: dict[
            str, dict[int, torch.Tensor]
        ] = {}  # of depths on several devices, or of several shapes
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
        self._vector = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
        self._layout = _known.setdefault(tuple(places.items()), places)

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
        numbers = self._vector[place.start : place.start + count].to(place.dtype)
        rows = numbers.reshape(len(place.keys), *place.shape)
        if tuple(keys) == place.keys:
            return rows.cpu().numpy()
        return array_of(dict(zip(place.keys, rows, strict=True)), keys)
