"""How does a compiled model run as it is written, for a forward of ours? Under a stance of torch's compiler."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _ForcedEager:
    """The stance of torch's compiler that all forwards of ours share, until the last of them has ended.

    It belongs to the process, and threads may end in any order: each restoring what it found would leave the stance of one
    that has ended on for ever.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._users = 0
        self._stance: Any = None

    def begin(self) -> None:
        with self.lock:
            if self._users == 0:
                self._restore()  # where the user's own stance, which was on when we left, has put ours back
                self._stance = torch.compiler.set_stance("force_eager")
            self._users += 1

    def end(self) -> None:
        with self.lock:
            self._users -= 1
            if self._users == 0:
                self._restore()

    def _restore(self) -> None:
        # Only where ours is on: the user may have taken another one meanwhile.
        if self._stance is not None and torch._dynamo.eval_frame._stance is self._stance.stance:
            self._stance.__exit__(None, None, None)
            self._stance = None


_forced_eager = _ForcedEager()


def _renew_lock() -> None:
    _forced_eager.lock = threading.Lock()  # a thread that the child does not have may hold the old one


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled models as they are written: code that `torch.compile` made skips hooks put on since."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to load the compiler takes a second
        yield
        return
    _forced_eager.begin()
    try:
        yield
    finally:
        _forced_eager.end()
