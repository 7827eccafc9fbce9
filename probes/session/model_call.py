"""How a user's model is called with a batch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.session.first_forward import RewrittenError
from depthscope.probes.session.forward import own_call
from depthscope.probes.session.session import Session


def batches(batch: Any) -> Iterator[Any]:
    """The batches in what a user passes.

    Parameters
    ----------
    batch : object
        One batch or an iterable of them.

    Yields
    ------
    object
        Each batch.
    """
    if isinstance(batch, (Mapping, torch.Tensor, tuple)):
        yield batch
    elif isinstance(batch, Iterable):
        yield from batch
    else:
        raise CaptureError(
            f"a batch of type {type(batch).__name__} came; expected a mapping, a tensor, a tuple, or an iterable of these"
        )


def call_model(model: nn.Module, batch: Any) -> Any:
    """The output of a model for a batch: a mapping is passed as keywords, a tuple or list as positional arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def call_observed(session: Session, batch: Any) -> Any:
    """The output of a session's model for one batch, with the session's hooks on.

    The model is called once more where the first forward found the structure, but lost the value of a state that was
    rewritten in place: the second forward copies states as they pass.

    Parameters
    ----------
    session : Session
        With its hooks on.
    batch : object
        One batch.

    Returns
    -------
    object
    """
    with torch.set_grad_enabled(session.options.gradients), own_call(session.owner):
        output = call_model(session.model, batch)
        # Other errors would come again.
        if any(isinstance(error, RewrittenError) for error in session.errors):
            session.errors.clear()
            output = call_model(session.model, batch)
        return output


class _ForcedEager:
    """The stance of torch's compiler that all measured steps share, until the last of them has ended.

    It belongs to the process, and recorders may close in any order: each restoring what it found would leave the stance of a
    closed one on for ever.
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
    """A context in which compiled models run as written: code that `torch.compile` made skips hooks put on since."""
    _forced_eager.begin()
    try:
        yield
    finally:
        _forced_eager.end()
