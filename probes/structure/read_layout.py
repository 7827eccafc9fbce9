"""How are the axes of a state ordered? By where the elements of its memory's first value are in it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from depthscope.probes.dataflow.axes import BATCHED, Axes
from depthscope.probes.model.layout import LayoutError, canonical
from depthscope.probes.reading.description import MemoryReading, StateReading
from depthscope.probes.reading.numbers import Numbers

Part = tuple[str, int, int]  # a letter, its size, and how far the numbers of neighbours along it are apart


def read_layout(memory: MemoryReading, state: StateReading, axes: Axes | None, batch_size: int) -> str | None:
    """The layout of a state as text; None where its axes are in no order that has one.

    ``axes``: of the memory's first value, where they are known.
    """
    parts = _parts_of_first(memory, axes, batch_size)
    numbers = state.numbers[0]
    if parts is None or len(state.numbers) > 1 or numbers.array is not None:
        return None
    single = [letter for letter, size, _ in parts if size == 1]
    named = []
    for vector in numbers.axes:
        if len(vector) == 1:
            named.append([single.pop(0)] if single else ["N"])
            continue
        letters = _letters(vector, parts)
        if letters is None:
            return None
        named.append(letters)
    flat = [letter for axis in named for letter in axis]
    if len(set(flat)) < len(flat) or "D" not in flat:
        return None
    return " ".join(axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in named)


def _parts_of_first(memory: MemoryReading, axes: Axes | None, batch_size: int) -> list[Part] | None:
    """The axes of one stream of the first value, outer first: features, the batch, and tokens."""
    found: list[Part] = []
    for dim, size in enumerate(memory.shape):
        stride = math.prod(memory.shape[dim + 1 :])
        if dim == memory.feature_axis:
            found.append(("D", size, stride))
            continue
        atoms = (
            [atom.itself() for atom in axes[dim]]
            if axes is not None and len(axes) == len(memory.shape)
            else []
        )
        if not atoms or math.prod(atom.size for atom in atoms) != size:
            found.append(
                ("B" if size == batch_size and not any(p[0] == "B" for p in found) else "T", size, stride)
            )
            continue
        for position, atom in enumerate(atoms):
            inner = math.prod(other.size for other in atoms[position + 1 :])
            found.append(("B" if atom.has(BATCHED) else "T", atom.size, stride * inner))
    return _with_sides(found)


def _with_sides(parts: list[Part]) -> list[Part] | None:
    """Two axes of tokens are the sides of an image."""
    tokens = [n for n, (letter, _, _) in enumerate(parts) if letter == "T"]
    if len(tokens) > 2 or sum(letter == "B" for letter, _, _ in parts) > 1:
        return None
    if len(tokens) == 2:
        for n, letter in zip(tokens, "HW", strict=True):
            parts[n] = (letter, *parts[n][1:])
    return parts


def _letters(vector: np.ndarray, parts: Sequence[Part]) -> list[str] | None:
    """Which axes of the first value, and of streams, one axis of a value is made of; outer first."""
    rest, found = vector - vector[0], list[str]()
    while len(rest) > 1:
        step = int(rest[1] - rest[0])
        if step == 0:
            changed = np.flatnonzero(rest)
            letter, size = "N", int(changed[0]) if len(changed) else len(rest)
        else:
            fits = [(letter, size) for letter, size, stride in parts if stride == step and size > 1]
            if not fits:
                return None
            letter, size = fits[0]
        if len(rest) % size or (rest.reshape(-1, size) - rest[::size, None] != rest[:size]).any():
            return None
        found.append(letter)
        rest = rest[::size]
    return found[::-1]


def token_order(
    memory: MemoryReading, numbers: Numbers, layout: str, batch_size: int, num_streams: int
) -> torch.Tensor:
    """Which of a reading's tokens each (sequence, token) is, (B, T).

    Raises LayoutError: Where the layout mixes tokens up.
    """
    places = canonical(
        torch.from_numpy(numbers.dense().copy()), layout, batch_size=batch_size, num_streams=num_streams
    )
    first = np.unravel_index(places[:, :, 0, 0].numpy(), memory.shape)
    kept = [index for dim, index in enumerate(first) if dim != memory.feature_axis]
    order = np.ravel_multi_index(kept, memory.token_shape) if kept else np.zeros(places.shape[:2], dtype=int)
    if len(np.unique(order)) != order.size:
        raise LayoutError(f"the layout {layout!r} has the same token twice; expected each once")
    return torch.from_numpy(np.asarray(order))
