"""Whose mistake is an error, and how is it said in one sentence? The input's, the machine's, the user's code's or ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import TracebackType

from depthscope.app.cli.command import BUG, USAGE
from depthscope.app.text.terminal import MAX_MESSAGE, printable

_FACTORY = re.compile(r"([A-Za-z_]\w*)[\w.]*:[A-Za-z_][\w.]*")


def sentence(error: BaseException, words: Sequence[str]) -> tuple[str, int]:
    """What to print for an error, and the exit code.

    Parameters
    ----------
    error : BaseException
        What a command raised.
    words : sequence of str
        The command line.

    Returns
    -------
    tuple of str and int
    """
    if isinstance(error, RecursionError):
        return (
            "the input is nested too deeply to be read; look for a file or an attribute within itself",
            USAGE,
        )
    if _out_of_memory(error):
        return (
            f"not enough memory ({one_line(error)}); give fewer --sequences or a shorter --length, a smaller run, or a "
            "larger machine"
        ), USAGE
    if isinstance(error, (ValueError, OSError)):
        return one_line(error), USAGE
    where = _place_in_users_code(error, words)
    if where:
        return f"your own code failed at {where}: {type(error).__name__}: {one_line(error)}", USAGE
    return (
        f"a bug in depthscope: {type(error).__name__}: {one_line(error)}; run the command again with --debug and report "
        "what it prints"
    ), BUG


def one_line(error: BaseException) -> str:
    """An error as one line for people.

    Parameters
    ----------
    error : BaseException
        What was raised.

    Returns
    -------
    str
    """
    # str() of an OSError is "[Errno 2] No such file or directory: 'a.nc'".
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror.lower()
        name = "" if error.filename is None else f"{printable(error.filename, limit=200)}: "
        return f"{name}{reason}"
    return printable(" ".join(str(error).split()), limit=MAX_MESSAGE) or type(error).__name__


def _out_of_memory(error: BaseException) -> bool:
    # torch's own errors are RuntimeErrors: OutOfMemoryError on an accelerator, the allocator's sentence on a CPU.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _place_in_users_code(error: BaseException, words: Sequence[str]) -> str | None:
    """File and line of the innermost frame in the package of a ``module:function`` that was given."""
    packages = {found[1] for word in words if (found := _FACTORY.fullmatch(word))} - {"depthscope"}
    place = None
    frame: TracebackType | None = error.__traceback__
    while frame is not None:
        package = str(frame.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in packages:
            place = f"{printable(frame.tb_frame.f_code.co_filename)}, line {frame.tb_lineno}"
        frame = frame.tb_next
    return place
