"""A small live store, and the frames of its log."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import xarray as xr

from depthscope.diagnostics.schema.live_store import LiveStore

HEAD = struct.Struct("<4sIII")


def frames(log: bytes) -> list[tuple[int, dict[str, object]]]:
    """First byte and head of each frame."""
    found, at = [], 0
    while at < len(log):
        _, of_head, of_data, _ = HEAD.unpack_from(log, at)
        found.append((at, json.loads(log[at + HEAD.size : at + HEAD.size + of_head])))
        at += HEAD.size + of_head + of_data
    return found


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
