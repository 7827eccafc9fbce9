"""What of the process is changed as long as some thread needs it? The first one begins, the last one ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class WhileNeeded:
    """A change of the process that all threads share: each restoring what it found would leave another's on for ever."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin, self._end = begin, end
        self._users = 0
        self._renew_lock()
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()  # a thread that the child does not have may hold the old one

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Need it inside of the block."""
        with self._lock:
            if self._users == 0:
                self._begin()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._end()
