"""A small live store, and logs as somebody forges them who knows the format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from depthscope.diagnostics.schema import live_store_frames
from depthscope.diagnostics.schema.live_store import LiveStore
from depthscope.diagnostics.schema.live_store_frames import frames_from


def begins(log: bytes) -> list[int]:
    """Byte of each frame of a log."""
    ends = [frame.end for frame in frames_from(log)]
    return [0, *ends[:-1]]


def chained(frames: list[tuple[int, bytes]]) -> bytes:
    """A log of some payloads, each with its checksum and that of the one before."""
    log, before = [], 0
    for kind, payload in frames:
        frame, before = live_store_frames.packed(kind, payload, before)
        log.append(frame)
    return b"".join(log)


def payloads(log: bytes) -> list[tuple[int, bytes]]:
    return [(frame.kind, log[frame.start : frame.end]) for frame in frames_from(log)]


def row(value: float) -> dict[str, object]:
    return {
        "statistics/token_count": ((), value),
        "statistics/sequence_count": ((), 1.0),
        "statistics/norm_sum": (("depth", "stream"), np.full((3, 1), value)),
    }


def written(path: Path, one_step: xr.DataTree, steps=range(5), **options) -> LiveStore:
    store = LiveStore(path, **options)
    if not store.has_state:
        store.save_state(one_step)
    for step in steps:
        store.append(step, row(float(step)))
    return store
