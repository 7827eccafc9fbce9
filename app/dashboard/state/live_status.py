"""Does a run still grow, and when was its last step? As a phrase, also where steps are missing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from depthscope.diagnostics.schema import Status

__all__ = ["LiveState", "live_state"]

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
