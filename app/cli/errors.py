"""Whose mistake is an error, and how is it said in one sentence? The input's, the machine's or ours."""

from __future__ import annotations

from depthscope.app.cli.command import BUG, USAGE
from depthscope.app.text.terminal import MAX_MESSAGE, printable


def sentence(error: BaseException) -> tuple[str, int]:
    """What to print for an error, and the exit code."""
    if isinstance(error, RecursionError):
        return (
            "the input is nested too deeply to be read; look for a file or an attribute within itself",
            USAGE,
        )
    # torch's own errors are RuntimeErrors: OutOfMemoryError on an accelerator, the allocator's sentence on a CPU.
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    ):
        return (
            f"not enough memory ({one_line(error)}); give fewer --sequences or a shorter --length, a smaller run, or a "
            "larger machine"
        ), USAGE
    if isinstance(error, (ValueError, OSError)):
        return one_line(error), USAGE
    return (
        f"a bug in depthscope: {type(error).__name__}: {one_line(error)}; run the command again with --debug and report "
        "what it prints"
    ), BUG


def one_line(error: BaseException) -> str:
    """An error as one line for people."""
    # str() of an OSError is "[Errno 2] No such file or directory: 'a.zarr'".
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror.lower()
        name = "" if error.filename is None else f"{printable(error.filename, longest=200)}: "
        return f"{name}{reason}"
    return printable(" ".join(str(error).split()), longest=MAX_MESSAGE) or type(error).__name__
