"""Which recorders are open? They are closed when the interpreter ends, and given up in a child process."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Protocol


class Closable(Protocol):
    """A recorder."""

    def close(self) -> None:
        """End the block."""

    def abandon(self) -> None:
        """Stop for good, silently: what is open belongs to another process."""


OPEN: weakref.WeakSet[Closable] = weakref.WeakSet()


def _leave_child_alone() -> None:
    """In a child process no recorder writes, warns or measures: the parent's goes on."""
    for recorder in list(OPEN):
        recorder.abandon()


def _close_all() -> None:
    for recorder in list(OPEN):
        recorder.close()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_leave_child_alone)


@cache
def close_at_exit() -> None:
    """Close what is open when the interpreter ends: a generator that nobody closed leaves its block too late to save."""
    # The last one registered runs first. That of thread pools, which saving needs, and that of zarr's event loop come with
    # their imports: so import them now.
    for name in ("zarr", "concurrent.futures.thread"):
        with suppress(ImportError):
            import_module(name)
    # Thread pools end before `atexit` begins, with the threads; the private name is the one that they use themselves.
    getattr(threading, "_register_atexit", atexit.register)(_close_all)
