"""When does Python look for garbage? Not while a forward is measured: every look would go through all that we noted so far."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Pause:
    """One pause that all measurements share, whatever thread they are in: the collector belongs to the process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._users = 0
        self._was_on = False

    def begin(self) -> None:
        with self.lock:
            if self._users == 0:
                self._was_on = gc.isenabled()
                gc.disable()
            self._users += 1

    def end(self) -> None:
        with self.lock:
            self._users -= 1
            if self._users == 0 and self._was_on:
                gc.enable()


_pause = _Pause()


def _renew_lock() -> None:
    _pause.lock = threading.Lock()  # a thread that the child does not have may hold the old one


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def no_collection() -> Iterator[None]:
    """Put the search for cyclic garbage off, in this process; what nothing refers to any more is freed at once all the same.

    A complete search goes through every object of the process, a tenth of a second for what torch and xarray alone bring.
    It comes when the objects are a quarter more, which the notes on one deep forward are.
    """
    _pause.begin()
    try:
        yield
    finally:
        _pause.end()
