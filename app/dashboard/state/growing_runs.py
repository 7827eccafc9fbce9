"""What has a run come to that is being written? Its last steps, analysed now and then, and the rows that were added."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from depthscope.app.dashboard.state.run_reading import (
    CACHE_BYTES,
    READINGS,
    Cache,
    UnreadableRun,
    read,
    sentence,
    version_of,
)
from depthscope.app.readings.provenance import FileVersion
from depthscope.app.readings.readings import Reading
from depthscope.app.readings.training_history import TrainingHistory
from depthscope.app.readings.training_history import history_of as read_history
from depthscope.diagnostics import schema
from depthscope.diagnostics.schema import LiveRows, Status

_rest = {"until": 0.0}
"""The time until which no growing run is analysed again."""

SHARE_OF_TIME = 0.2
"""Of the server's time that analyses of growing runs may take; in between, the last one is shown. A heuristic of ours."""

MOST_FOLLOWED = 16
"""Live stores whose rows stay in memory. A heuristic of ours."""

_stores = Cache(MOST_FOLLOWED)

_followed = Cache(MOST_FOLLOWED)
"""Histories of live stores."""

_ended = Cache(CACHE_BYTES // 4, lambda history: history.num_bytes)
"""Histories of runs that have ended."""


def is_growing(path: Path) -> bool:
    """Whether a process writes a live store at this moment."""
    return schema.is_live_store(path) and schema.is_being_written(path)


def is_waiting(path: Path) -> bool:
    """Whether a process writes a live store, or may do so on another machine, in which no step was finished yet."""
    store = _current_store(path)
    if store is None:
        return False
    status = store.status()
    return status.num_rows == 0 and live_state(status).is_growing


def read_growing(name: str, path: Path) -> tuple[Reading, ...] | UnreadableRun:
    """A run that is being written, as of its last steps: analysed again when there are new ones, but not all the time."""
    known = READINGS.peek(path)
    begun = time.monotonic()
    if known is not None and begun < _rest["until"]:
        return known
    try:
        found = READINGS.get(path, partial(read, name, path), (name, version_of(path)))
    except OSError as error:
        return UnreadableRun(name, path, sentence(error))
    if found is not known:
        ended = time.monotonic()
        _rest["until"] = ended + (ended - begun) * (1 - SHARE_OF_TIME) / SHARE_OF_TIME
    return found


def live_states(listed: Mapping[str, Path]) -> dict[str, LiveState]:
    """What is to be said of the runs that are or were written step by step."""
    stores = {name: _current_store(path) for name, path in listed.items()}
    return {name: live_state(each.status()) for name, each in stores.items() if each is not None}


def _current_store(path: Path) -> LiveRows | None:
    """The live store of a path as it is now; None where there is none, or none that can be read."""
    with suppress(schema.SchemaError, OSError):
        if schema.is_live_store(path):
            return _stores.refreshed(path, partial(LiveRows, path))
    return None


def history_of(reading: Reading) -> TrainingHistory | UnreadableRun:
    """What a reading measured step by step; of a live store with the rows that were added since the last call."""
    path, key = Path(reading.path), (reading.path, reading.chain)
    make = partial(read_history, reading)
    try:
        if schema.is_live_store(path):
            return _followed.refreshed(key, make)
        return _ended.get(key, make, FileVersion.of(path))
    except (schema.SchemaError, OSError) as error:
        return UnreadableRun(reading.name, path, sentence(error))


GROWS_WITHIN = 600.0
"""Seconds since the last step of a store on another machine, whose lock is not seen here: after them it counts as ended."""

SILENT = 60.0
"""Seconds without a step after which a badge is no longer green."""


class LiveState(NamedTuple):
    """What a page shows of a run that is or was written step by step."""

    words: str  # such as ``step 4 200, 3 s ago``
    colour: str  # of Streamlit's badges
    is_growing: bool  # whether further steps may come


def live_state(status: Status) -> LiveState:
    """The state of a live store."""
    step = "no step yet" if status.last_step is None else f"step {status.last_step:,}".replace(",", " ")
    age = _duration(status.age_seconds)
    if status.state in ("finished", "killed"):
        word, colour = ("ended", "gray") if status.state == "finished" else ("killed", "red")
        return LiveState(f"{word} at {step}, {age} ago", colour, False)
    elsewhere = f", written on {status.host}" if status.state == "unknown" else ""
    grows = not elsewhere or status.age_seconds < GROWS_WITHIN
    colour = "green" if status.age_seconds < SILENT else "orange"
    return LiveState(f"{step}, {age} ago{elsewhere}", colour, grows)


def _duration(seconds: float) -> str:
    if not np.isfinite(seconds):
        return "some time"
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
