"""What does a process owe its shell? Streams that may be closed, and an interrupt that ends it whatever it is doing."""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from depthscope.app.cli.command import INTERRUPTED
from depthscope.diagnostics.errors import StorageError

# After an interrupt a command has this long to clean up after itself: to remove what it has half written, and to let the step
# of each of its threads end.
GRACE_SECONDS = 5.0


class _ClosedOutput(io.TextIOBase):
    """A standard output that the shell closed (``>&-``), for which Python has None: an error only once it is written to."""

    def write(self, text: str) -> int:
        raise StorageError(errno.EBADF, "standard output is closed")


def standard_streams() -> None:
    """Make the three standard streams safe to use: closed ones, and ones that cannot show every character."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The next file that is opened would get the free number, and what is printed would be written into it.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = _ClosedOutput()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the process ends with it)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal in ASCII prints an escape where a table has an arrow, rather than an error.
            stream.reconfigure(errors="backslashreplace")


class _Remarks(logging.Handler):
    """Warnings of our own modules as remarks on stderr: one line, and nothing in it that a terminal obeys."""

    def emit(self, record: logging.LogRecord) -> None:
        from depthscope.app.text.terminal import remark

        remark(record.getMessage())


@contextlib.contextmanager
def remarks_from_log() -> Iterator[None]:
    """Print what our modules log, from warnings on, as remarks."""
    handler = _Remarks(logging.WARNING)
    logger = logging.getLogger("depthscope")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def discard_stdout() -> None:
    """Let what is still in the buffer of stdout go nowhere.

    Python flushes it once more at exit, and would print the error of the first time again.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Interrupts:
    """Ctrl-C while a command runs: the first raises KeyboardInterrupt, the second, or `GRACE_SECONDS`, ends the process.

    Code of others may swallow the exception or turn it into another one; `happened` stays true. Where SIGINT is not Python's
    own (another handler, ignored in the background of a shell, another thread than the main one), nothing is changed.

    ``whole_process``: the process ends after the command: an interrupt during its last steps ends it without a
    traceback.
    """

    def __init__(self, *, whole_process: bool) -> None:
        self.happened = False
        self._whole_process = whole_process
        self._ours = False

    def __enter__(self) -> Interrupts:
        main_thread = threading.current_thread() is threading.main_thread()
        self._ours = main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._ours:
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._ours:
            after = _interrupted_again if self._whole_process else signal.default_int_handler
            signal.signal(signal.SIGINT, after)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.happened:
            _interrupted_again(number, frame)
        self.happened = True
        if self._whole_process:
            # An exception that meets a finaliser or a callback is printed by Python and forgotten.
            watch = threading.Timer(GRACE_SECONDS, _interrupted_again, (number, None))
            watch.daemon = True
            watch.start()
            sys.unraisablehook = _without_interrupts
        raise KeyboardInterrupt


@contextlib.contextmanager
def interrupts_as_python_has_them() -> Iterator[None]:
    """Run code of the user's, which may have its own idea of what Ctrl-C means, such as to save a checkpoint first."""
    handler = signal.getsignal(signal.SIGINT)
    # Ignored as by nohup, or of somebody else.
    if not isinstance(getattr(handler, "__self__", None), Interrupts):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _without_interrupts(unraisable: Any) -> None:
    """What Python prints of an exception that nothing can catch; an interrupt there is said once, at the end."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def leave() -> NoReturn:
    """End the process as interrupted.

    Python itself would end it by the signal where the interrupt met code that is run from text, such as the making of a
    dataclass: then the exit code is not 130.
    """
    # What the modules registered, such as the end of a server in another process.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(INTERRUPTED)


def _interrupted_again(number: int, frame: FrameType | None) -> None:
    # Straight to the file: the buffer of stderr may be what the interrupted code is writing to.
    with contextlib.suppress(OSError):
        os.write(2, b"depthscope: interrupted\n")
    os._exit(INTERRUPTED)
