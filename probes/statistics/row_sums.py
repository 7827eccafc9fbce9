"""What is added up over tokens? Rows of states, coefficients of connections; and the scale of a loss."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from depthscope.diagnostics.errors import InputError
from depthscope.probes.connections.proof import Parts
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


def coefficient_sums(parts: Parts, mask_BT: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Sums of H_res, H_pre and H_post of one call of a connection over its real tokens, in float64.

    ``mask_BT``: true on real tokens; None where all are real.
    Returns: ``h_res_sum`` (N, N) as the module computes it, ``h_pre_sum`` and ``h_post_sum`` (N), and
    ``h_pre_token_count``, the number of tokens in ``h_pre_sum``. Weights that do not exist, or have several views, are
    left out.
    """
    found: dict[str, torch.Tensor] = {}
    if parts.mix is not None:
        found["h_res_sum"] = _over_tokens(parts.mix, mask_BT)
    if parts.write.shape[-1] == 1:
        found["h_post_sum"] = _over_tokens(parts.write.squeeze(-1), mask_BT)
    read = parts.read
    if read is not None and read.shape[-2] == 1:
        found["h_pre_sum"] = _over_tokens(read.squeeze(-2), mask_BT)
        count = torch.tensor(float(read.shape[0] * read.shape[1])) if mask_BT is None else mask_BT.sum()
        found["h_pre_token_count"] = count.double()
    return found


def _over_tokens(weights: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    flat = weights.detach().flatten(0, 1)
    if mask_BT is not None:
        # Not times the mask: NaN on padding times 0 is NaN. Nor by a selection, which would wait for the device.
        real = mask_BT.flatten().to(flat.device).view(-1, *[1] * (flat.ndim - 1))
        flat = torch.where(real, flat, 0.0)
    return flat.sum(0, dtype=torch.float64)


class LossScale:
    """The scale of a gradient scaler, read as a tensor inside the backward, before the scaler changes it.

    ``scaler``: the scaler that multiplies the user's loss.
    Raises InputError: For something that is not a ``torch.amp.GradScaler``.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None):
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise InputError(
                f"scaler is a {type(scaler).__name__}; expected the torch.amp.GradScaler that scales the loss"
            )
        self._scaler = scaler
        self._first: torch.Tensor | None = None  # of the present step

    def __call__(self) -> torch.Tensor | None:
        """The present scale, on the scaler's device; divide by it at once, since ``scaler.update`` overwrites it.

        Returns: None without a scaler, with a disabled one, and before it scaled anything.
        """
        if self._scaler is None or not self._scaler.is_enabled():
            return None
        # The private tensor: get_scale() reads it back, and inside a backward nothing may wait for the device.
        scale = self._scaler._scale
        if self._first is None and scale is not None:
            self._first = scale.detach().clone()
        return scale

    def end(self) -> float | None:
        """End a step: the scale of its first gradient, read back from the device; None where no gradient was divided."""
        first, self._first = self._first, None
        return None if first is None else float(first)
