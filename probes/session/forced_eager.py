"""How does a compiled model run as it is written, for a forward of ours? Under a stance of torch's compiler."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from depthscope.probes.model.while_needed import WhileNeeded


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


_stance = _Stance()
_eager = WhileNeeded(_stance.take, _stance.restore)


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled models as they are written: code that `torch.compile` made skips hooks put on since."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to load the compiler takes a second
        yield
        return
    with _eager():
        yield
