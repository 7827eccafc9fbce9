"""How is a checkpoint refused? With one sentence, whatever was raised; an error of the user's own code is shown as theirs."""

from __future__ import annotations

import linecache
import logging
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


# --- the user's own code

# This package, by the path that it was imported from: in a checkout the files are elsewhere, and so are the user's own.
OUR_FOLDERS = (str(Path(__file__).parents[2]),)
STANDARD_LIBRARY = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
INSTALLED = ("site-packages", "dist-packages")
# Functions of ours that a model's own code runs in: our trace, and `model.hooks.WatchedMethod`, which calls its forward.
PASSED_THROUGH = ("__torch_dispatch__", "__torch_function__", "WatchedMethod.__call__")
REPEATED = 50  # calls of the user's own code in one traceback, more than any model nests; heuristic
# Files of torch from which a model's own code is called, forward and backward
CALLS_OF_A_MODEL = (
    ("nn", "modules", "module.py"),
    ("torch", "autograd", "function.py"),
    ("torch", "autograd", "graph.py"),
)


@contextmanager
def errors_of_user_code(source: str) -> Iterator[None]:
    """Turn an error of the user's own code into one sentence that names the place in it.

    KeyboardInterrupt passes: it is the user at the keyboard.

    ``source``: what runs their code, such as the specification of a factory.
    Raises CheckpointError: With the type, the message, the file, the line and its text.
    """
    try:
        yield
    except (CheckpointError, KeyboardInterrupt):
        raise
    # sys.exit and GeneratorExit too: this process does not end by what a checkpoint does
    except BaseException as error:
        raise CheckpointError(own_error(source, error)) from error


def own_error(source: str, error: BaseException) -> str:
    """The sentence for an error in the user's code, or in that of a library's model.

    ``source``: what ran it, in the words of the message.
    """
    name = type(error).__name__
    reason = first_line(error).removeprefix(f"{name}: ")
    named = name if reason == name else f"{name}: {reason}"
    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith("<")
        and not _is_below(frame.f_code.co_filename, OUR_FOLDERS)
    ]
    own = [frame for frame in frames if _is_users(frame[0])]
    # The innermost line of theirs: it may have called a library with what does not fit.
    file, line = (own or frames or [("", 0)])[-1]
    text = linecache.getline(file, line)
    if isinstance(error, SyntaxError) and error.filename and error.lineno:  # its place is in no frame
        file, line, text = error.filename, error.lineno, error.text or ""
        own = [(file, line)]
    code = " ".join(text.split())[:120]
    place = f" ({file}, line {line}{f': {code}' if code else ''})" if file else ""
    if own:
        return f"{source} stops with an error of its own code, {named}{place}; correct it there"
    return f"{source} stops with {named}{place}; its settings, its weights or the input do not fit its code"


def _is_users(file: str) -> bool:
    is_installed = any(part in INSTALLED for part in Path(file).parts)
    return not is_installed and not _is_below(file, STANDARD_LIBRARY) and not _is_below(file, OUR_FOLDERS)


def _is_below(file: str, folders: tuple[str, ...]) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in folders)


def is_model_error(error: BaseException) -> bool:
    """Whether an error comes from a model, and not from this library's own code around it.

    Returns: True where, after the last frame of this library, a module was called or code outside all libraries ran.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, RecursionError):
        # It is raised in whatever code comes last; who calls itself is whose frames are many.
        files = [frame.f_code.co_filename for frame in frames]
        return sum(map(_is_users, files)) > REPEATED
    # An error in what they call is the model's.
    files = [
        frame.f_code.co_filename for frame in frames if not frame.f_code.co_qualname.endswith(PASSED_THROUGH)
    ]
    # A hook of ours runs within the call of a module too, and is then the last.
    last = max((i for i, file in enumerate(files) if _is_below(file, OUR_FOLDERS)), default=-1)
    return any(
        Path(file).parts[-3:] in CALLS_OF_A_MODEL or _is_users(file)
        for file in files[last + 1 :]
        if not file.startswith("<")
    )
