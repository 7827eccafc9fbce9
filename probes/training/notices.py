"""What does a recorder say, and which recorders are open? Warnings that never end the user's loop."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import warnings
import weakref
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthscope.diagnostics.errors import DepthscopeError
from depthscope.probes.model.errors import as_capture_error
from depthscope.probes.model.hooks import without_frames

if TYPE_CHECKING:
    from depthscope.diagnostics import Finding

OURS = str(Path(__file__).parents[1])  # the folder of the probes

MOST_ALIKE = 3  # steps that were not measured for one reason, which are reported one by one


class ProbeWarning(DepthscopeError, UserWarning):
    """A step could not be measured, or the run not be saved; the user's run goes on."""


class TrainingStopped(DepthscopeError, RuntimeError):
    """A finding as severe as ``stop_on`` was met; raised at the end of the step, after everything of it was saved.

    ``step``: of the training.
    ``findings``: those that are as severe, the worst first; of several processes only the one that writes has them.
    """

    def __init__(self, step: int, findings: tuple[Finding, ...]) -> None:
        sentence = (
            f"{findings[0].sentence} {findings[0].advice}"
            if findings
            else "the process that writes has a severe finding"
        )
        super().__init__(f"step {step}: {sentence}".strip())
        self.step, self.findings = step, findings


class Notices:
    """Sentences for the end of a step.

    ``errors``: what is behind them.
    """

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self._sentences: list[str] = []
        self._said: set[str] = set()
        self._missing: dict[str, list[int]] = {}  # steps that were not measured, by the reason

    def say(self, message: str, error: BaseException | None = None) -> None:
        """Note a sentence for the end of the step."""
        if error is not None:
            self.errors.append(as_capture_error(without_frames(error)))
        self._sentences.append(message)

    def say_once(self, reason: str, message: str) -> None:
        """Note a sentence, unless one for the same reason was noted before."""
        if reason not in self._said:
            self._said.add(reason)
            self.say(message)

    def say_not_measured(self, step: int, error: BaseException) -> None:
        """Say why a step is missing; of a reason that comes again and again, at the end only for how many."""
        reason = str(error) or type(error).__name__
        steps = self._missing.setdefault(reason, [])
        steps.append(step)
        if len(steps) > MOST_ALIKE:
            return
        more = "; further steps that fail for this reason are reported together" * (len(steps) == MOST_ALIKE)
        self.say(f"step {step} was not measured: {reason}{more}", error)

    def say_how_many(self) -> None:
        """Say which steps are missing without a sentence of their own."""
        for reason, steps in self._missing.items():
            if more := steps[MOST_ALIKE:]:
                of = f"steps {more[0]} to {more[-1]}"
                self.say(f"{of} were not measured for the same reason ({len(more)} of them): {reason}")
        self._missing = {}

    def warn(self) -> None:
        """Say what there is to say, now that everything is in order."""
        sentences, self._sentences = self._sentences, []
        for sentence in sentences:
            warn(sentence)

    def forget(self) -> None:
        """Say nothing of what was noted so far."""
        self._sentences = []


def warn(sentence: str) -> None:
    """Warn the user; where warnings are errors it is printed: ours must not end their run, nor hide their own error."""
    try:
        warnings.warn(sentence, ProbeWarning, stacklevel=_user_frame())
    except ProbeWarning:
        say_as_text(sentence)


def say_as_text(sentence: str) -> None:
    """Print a warning that would have been raised."""
    sys.stderr.write(f"depthscope: {sentence}\n")


def _user_frame() -> int:
    """How many frames above `warnings.warn` in `warn` the user's line is."""
    # A function of its own: a frame that refers to itself would keep the recorder alive.
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(OURS):
        frame, level = frame.f_back, level + 1
    return level


OPEN: weakref.WeakSet[Any] = weakref.WeakSet()
"""The recorders whose block has begun and not ended."""


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
