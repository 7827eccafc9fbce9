"""How is a checkpoint refused? With one sentence, whatever transformers, torch or a tokenizer raised."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from depthscope.diagnostics.errors import InputError

LONGEST_REASON = 300  # characters of another library's message; more is not read


class CheckpointError(InputError):
    """A checkpoint that cannot be loaded; the message states what came, what was expected and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type where it has none."""
    name = type(error).__name__
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # an error of the user's own may fail to print
        return name
    if not lines:
        return name
    # The message of a KeyError is the key alone, which is no sentence without the name.
    line = f"{name}: {lines[0]}" if isinstance(error, (LookupError, AttributeError, TypeError)) else lines[0]
    return printable(line, LONGEST_REASON)


def printable(text: str, longest: int = 100) -> str:
    """A text that came from outside, fit for a message."""
    shown = "".join(sign if sign.isprintable() else "?" for sign in text[:longest])
    return shown if len(text) <= longest else f"{shown}…"


@contextmanager
def errors_of(
    library: str, message: str, advice: str = "check that the download is complete"
) -> Iterator[None]:
    """Turn whatever another library raises on a checkpoint into a `CheckpointError`.

    The libraries promise no types: odd files made them raise some twenty, from ZeroDivisionError to RecursionError.
    KeyboardInterrupt and SystemExit pass.

    ``message``: beginning of the sentence; the library's own first line follows in brackets.
    """
    # Its log repeats the sentence, in many lines and before it: what matters in it is checked or raised.
    log = logging.getLogger(library)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except CheckpointError:
        raise
    except ImportError as error:
        what = f"run: pip install {error.name}" if error.name else "install what it names"
        raise CheckpointError(
            f"{message}: {library} needs a package that is not there ({first_line(error)}); {what}"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{message} ({_reason(error)}); {advice}") from error
    finally:
        log.setLevel(level)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    # torch's allocator raises a RuntimeError, with an address of its source file
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "it needs more memory than there is"
    return first_line(error)
