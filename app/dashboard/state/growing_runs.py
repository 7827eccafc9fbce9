"""What has a run come to that is being written? Its last steps, analysed now and then, and the rows that were added."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import RLock
from typing import TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from depthscope.app.dashboard.state.run_reading import (
    CACHE_BYTES,
    ReadingCache,
    UnreadableRun,
    read,
    sentence,
    version_of,
)
from depthscope.app.readings.first_findings import FirstFindings
from depthscope.app.readings.provenance import FileVersion
from depthscope.app.readings.readings import Reading
from depthscope.app.readings.training_history import TrainingHistory
from depthscope.app.readings.training_history import history_of as read_history
from depthscope.diagnostics import schema
from depthscope.diagnostics.schema import LiveRows, Status

Key = TypeVar("Key")
Rows = TypeVar("Rows", LiveRows, TrainingHistory)

_rest = {"until": 0.0}
"""The time until which no growing run is analysed again."""

SHARE_OF_TIME = 0.2
"""Of the server's time that analyses of growing runs may take; in between, the last one is shown. A heuristic of ours."""

MOST_FOLLOWED = 16
"""Live stores whose rows stay in memory. A heuristic of ours."""

_lock = RLock()
"""Of what follows: all visitors share it."""

_growing: dict[Path, tuple[FileVersion, tuple[Reading, ...] | UnreadableRun]] = {}
"""What was read last of a run that is being written."""

_stores: OrderedDict[Path, LiveRows] = OrderedDict()

_followed: OrderedDict[tuple[Path, str], TrainingHistory] = OrderedDict()

_histories = ReadingCache(CACHE_BYTES // 4, lambda history: history.num_bytes)
"""Of runs that have ended."""

_first_findings: WeakKeyDictionary[TrainingHistory, FirstFindings] = WeakKeyDictionary()


def is_growing(path: Path) -> bool:
    """Whether a process writes a live store at this moment."""
    return schema.is_live_store(path) and schema.is_being_written(path)


def is_waiting(path: Path) -> bool:
    """Whether a process writes a live store, or may do so on another machine, in which no step was finished yet."""
    store = _current_store(path)
    if store is None:
        return False
    status = store.status()
    return status.num_rows == 0 and live_state(status, store.times).is_growing


def is_known(path: Path) -> bool:
    """Whether a run that is being written was analysed before."""
    return path in _growing


def read_growing(
    name: str, path: Path, progress: Callable[[str, int, int], None] | None
) -> tuple[Reading, ...] | UnreadableRun:
    """A run that is being written, as of its last steps: analysed again when there are new ones, but not all the time."""
    with _lock:
        version, found = _growing.get(path, (None, None))
        begun = time.monotonic()
        if found is not None and begun < _rest["until"]:
            return found
        try:
            now = version_of(path)
        except OSError as error:
            return UnreadableRun(name, path, sentence(error))
        if found is None or version != now:
            found = read(name, path, progress)
            _growing[path] = now, found
            ended = time.monotonic()
            _rest["until"] = ended + (ended - begun) * (1 - SHARE_OF_TIME) / SHARE_OF_TIME
        return found


def read_again(reading: Reading) -> Reading | None:
    """A reading of a run that is being written, as of its last steps.

    Returns: The same one where there is nothing new; None where it cannot be read any more.
    """
    found = read_growing(reading.run, Path(reading.path), None)
    if isinstance(found, UnreadableRun):
        return None
    return next((each for each in found if each.chain == reading.chain), None)


def live_states(listed: Mapping[str, Path]) -> dict[str, LiveState]:
    """What is to be said of the runs that are or were written step by step."""
    stores = {name: _current_store(path) for name, path in listed.items()}
    return {name: live_state(each.status(), each.times) for name, each in stores.items() if each is not None}


def has_history(path: Path) -> bool:
    """Whether it is a store with two measured steps or more."""
    store = _current_store(path)
    return store is not None and store.status().num_rows >= 2


def _current_store(path: Path) -> LiveRows | None:
    """The live store of a path as it is now; None where there is none, or none that can be read."""
    with _lock, suppress(schema.SchemaError, OSError):
        if schema.is_live_store(path):
            return _followed_to_now(_stores, path, partial(LiveRows, path))
    return None


def _followed_to_now(kept: OrderedDict[Key, Rows], key: Key, opened: Callable[[], Rows]) -> Rows:
    """What follows a live store, with the rows that were added; those that were not asked for lately are let go."""
    if key in kept:
        kept[key].refresh()
    else:
        kept[key] = opened()
    kept.move_to_end(key)
    while len(kept) > MOST_FOLLOWED:
        kept.popitem(last=False)
    return kept[key]


def history_of(reading: Reading) -> TrainingHistory | UnreadableRun:
    """What a reading measured step by step; of a live store with the rows that were added since the last call."""
    path = Path(reading.path)
    key = (path, reading.chain)
    with _lock:
        try:
            if not schema.is_live_store(path):
                history: TrainingHistory = _histories.get(
                    (*key, FileVersion.of(path)), partial(read_history, reading)
                )
                return history
            return _followed_to_now(_followed, key, partial(read_history, reading))
        except (schema.SchemaError, OSError) as error:
            _followed.pop(key, None)
            return UnreadableRun(reading.name, path, sentence(error))


def first_findings_of(history: TrainingHistory) -> FirstFindings:
    """Where findings began: one for a history, which remembers the steps that were judged."""
    with _lock:
        return _first_findings.setdefault(history, FirstFindings(history))


MISSED_BEATS = 4
"""A run is stale when its last step is older than so many of its longest recent intervals. A heuristic of ours."""

RECENT = 20
"""Intervals between steps that its cadence is taken from."""

LEAST_SECONDS = 5.0
"""A shorter silence is never called stale: a writer waits for a disk, or for a page fault."""


@dataclass(frozen=True)
class LiveState:
    """What a page shows of a run that is or was written step by step.

    ``words``: such as ``step 4 200, 3 s ago``.
    ``colour``: of Streamlit's badges.
    ``is_growing``: whether further steps may come.
    """

    words: str
    colour: str
    is_growing: bool


def live_state(status: Status, times: np.ndarray | None) -> LiveState:
    """The state of a live store.

    ``times``: when its steps were measured, in seconds since 1970.
    """
    step = "no step yet" if status.last_step is None else f"step {status.last_step:,}".replace(",", " ")
    age = _duration(status.age_seconds)
    if status.state == "finished":
        return LiveState(f"ended at {step}, {age} ago", "gray", False)
    if status.state == "killed":
        return LiveState(f"killed at {step}, {age} ago", "red", False)
    if status.state == "unknown":
        # Its writer ran on another machine, whose lock is not seen here: it may still write.
        stale = status.age_seconds > _patience(times)
        words = f"{step}, {age} ago, written on {status.host}"
        return LiveState(f"{words} · STALE" if stale else words, "orange" if stale else "green", not stale)
    if status.age_seconds > _patience(times):
        return LiveState(f"{step}, {age} ago · STALE", "orange", True)
    return LiveState(f"{step}, {age} ago", "green", True)


def _patience(times: np.ndarray | None) -> float:
    intervals = np.diff(times[-RECENT - 1 :]) if times is not None else np.zeros(0)
    known = intervals[np.isfinite(intervals)]
    return max(LEAST_SECONDS, MISSED_BEATS * float(known.max(initial=0.0)))


def _duration(seconds: float) -> str:
    if not np.isfinite(seconds):
        return "some time"
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
