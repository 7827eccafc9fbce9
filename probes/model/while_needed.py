"""What of the process is changed while some thread needs it? The search for garbage is off, compiled models run as written.

The first one who needs it begins, the last one ends.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


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


class _Pause:
    was_on = False

    def begin(self) -> None:
        self.was_on = gc.isenabled()
        gc.disable()

    def end(self) -> None:
        if self.was_on:
            gc.enable()


class _Stance:
    """The stance of torch's compiler that all forwards of ours share."""

    def __init__(self) -> None:
        self._ours: Any = None

    def take(self) -> None:
        self.restore()  # where the user's own stance, which was on when we left, has put ours back
        self._ours = torch.compiler.set_stance("force_eager")

    def restore(self) -> None:
        # Only where ours is on: the user may have taken another one meanwhile.
        if self._ours is not None and torch._dynamo.eval_frame._stance is self._ours.stance:
            self._ours.__exit__(None, None, None)
            self._ours = None


_pause, _stance = _Pause(), _Stance()
no_collection = WhileNeeded(_pause.begin, _pause.end)
"""Put the search for cyclic garbage off, in this process; what nothing refers to any more is freed at once all the same.

A complete search goes through every object of the process, a tenth of a second for what torch and xarray alone bring, and
through all that is noted of a forward. It comes when the objects are a quarter more, which the notes on one deep forward are.
"""
_eager = WhileNeeded(_stance.take, _stance.restore)


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled models as they are written: code that `torch.compile` made skips hooks put on since."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to load the compiler takes a second
        yield
        return
    with _eager():
        yield
