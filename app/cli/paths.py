"""Can this be read, and that be written? Types of arguments that are paths, checked before anything is read or computed."""

from __future__ import annotations

import argparse
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from depthscope.app.cli.values import Checked, quoted, require_text
from depthscope.diagnostics.errors import AbsentError, InputError

# A text of this size gives some ten million tokens; a capture reads a few thousand.
MAX_TEXT_BYTES = 100_000_000
# What a file is called while it is written: a dot, the name, another dot and eight characters.
_TEMPORARY_CHARACTERS = 12


def require_ordinary(text: str, option: str, expected: str = "a file or a folder on disk") -> Path:
    """A path to a file or folder that exists; what would hang when it is read, or never end, is refused.

    Raises InputError: For a device, pipe or socket, or a file with a slash at its end.
    Raises OSError: For a path that is missing, or that a link of a circle leads to.
    """
    path = Path(require_text(text)).expanduser()
    # stat and not exists: of a circle of links `exists` is False, or raises a RuntimeError.
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(
            f"{option} {quoted(text)} is a pipe, a device or a socket, so it is not a regular file; expected {expected}"
        )
    if f"{os.path.realpath(path)}/".startswith(("/proc/", "/sys/")):
        # Regular files by their kind, but reading some of them waits for ever, or has no end.
        raise InputError(f"{option} {quoted(text)} is a file of the running system; expected one of your own")
    # pathlib drops the slash, with which the system itself would refuse the file.
    if text.endswith(("/", os.sep)) and not stat.S_ISDIR(mode):
        raise InputError(f"{option} {quoted(text)} is a file; leave out the slash at its end")
    return path


def run_endings() -> Sequence[str]:
    """How the names of saved runs end."""
    from depthscope.diagnostics.schema import SUFFIXES  # costs xarray

    return SUFFIXES


def _is_live_store(path: Path) -> bool:
    from depthscope.diagnostics.schema import is_live_store  # costs xarray

    return is_live_store(path)


def read_bounded(text: str) -> bytes:
    """All bytes of a file, or of stdin for ``-``, up to a limit.

    Raises InputError: For more than the limit, or a standard input that is closed.
    """
    if text == "-":
        if sys.stdin is None or sys.stdin.closed:
            raise InputError("standard input is closed; name a file, or pipe a text into --text -")
        content = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    else:
        # Not blocking: some files of /proc are regular, and reading them waits for ever for what may come.
        with open(os.open(Path(text).expanduser(), os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1) or b""
    if len(content) > MAX_TEXT_BYTES:
        raise InputError(f"{quoted(text)} has more than {MAX_TEXT_BYTES} bytes; give a part of it")
    return content


@dataclass(frozen=True)
class InputPath(Checked):
    """A file or folder that is read. One that is missing is left to the command where `must_exist` is false."""

    must_exist: bool = True

    def check(self, value: str, option: str, args: argparse.Namespace) -> None:
        """Refuse what cannot be read; see `Checked.check`."""
        require_text(value)
        # lexists: a link to nothing has an error of its own.
        if self.must_exist or os.path.lexists(Path(value)):
            require_ordinary(value, option)


@dataclass(frozen=True)
class InputText(Checked):
    """A text file, or ``-`` for stdin."""

    def check(self, value: str, option: str, args: argparse.Namespace) -> None:
        """Refuse what is no file, or a large one; see `Checked.check`."""
        if value == "-":
            return
        path = require_ordinary(value, option, "one with text, or - for stdin")
        if path.is_dir():
            raise InputError(
                f"{option} {quoted(value)} is a folder; expected a file of UTF-8 text, or - for stdin"
            )
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise InputError(
                f"{option} {quoted(value)} has {path.stat().st_size} bytes; give a part of it, "
                f"at most {MAX_TEXT_BYTES}"
            )


@dataclass(frozen=True)
class InputRun(Checked):
    """A saved run; or a folder of runs where `folders` is true."""

    folders: bool = False

    def check(self, value: str, option: str, args: argparse.Namespace) -> None:
        """Refuse what cannot be a run by its name and kind; see `Checked.check`."""
        require_text(value)
        if not os.path.lexists(Path(value)):
            raise AbsentError(
                f"no run at {quoted(value)}; list the runs of a folder with: depthscope dashboard FOLDER"
            )
        path = require_ordinary(value, option)
        if path.is_dir() and (self.folders or _is_live_store(path)):
            return
        if not path.name.endswith(tuple(run_endings())):
            raise InputError(
                f"{quoted(value)} is not a run; expected a live store, or a name that ends in {', '.join(run_endings())}"
            )


@dataclass(frozen=True)
class OutputFile(Checked):
    """A file that is written: nothing that exists is replaced without ``--force``.

    ``noun``: what is written, for the message.
    ``endings``: returns how its name may end.
    ``example``: a name for the message; the endings are listed without one.
    """

    noun: str
    endings: Callable[[], Sequence[str]]
    example: str = ""

    def check(self, value: str, option: str, args: argparse.Namespace) -> None:
        """Refuse a name that cannot be written or is taken; see `Checked.check`."""
        if not value.endswith(tuple(self.endings())):
            expected = self.example and f"such as {self.example}"
            expected = expected or f"a name that ends in {', '.join(self.endings())}"
            raise InputError(
                f"{option} {quoted(value)} is not the name of a {self.noun}; expected {expected}"
            )
        require_text(value)
        path = Path(value)
        if path.name in self.endings():
            raise InputError(f"{option} {quoted(value)} is an ending without a name; put one before it")
        sources = [
            source for source in (getattr(args, "run", None), *(getattr(args, "runs", None) or ())) if source
        ]
        # realpath and not resolve, which raises a RuntimeError for a link to itself.
        if os.path.realpath(path) in map(os.path.realpath, sources):
            raise InputError(
                f"{option} {quoted(value)} is the run itself, whose trace it would replace; "
                f"name another file, or leave {option} out"
            )
        # A link to nothing too: it is somebody's.
        if os.path.lexists(path) and not getattr(args, "force", False):
            raise InputError(
                f"{option} {quoted(value)} exists; name another file, or add --force to replace it"
            )
        if path.is_dir() and not value.endswith(".zarr"):
            raise InputError(f"{option} {quoted(value)} is a folder; name a file")
        require_writable(path, option)


@dataclass(frozen=True)
class OutputFolder(Checked):
    """A folder that is written to, and made where it is missing; the command itself knows which files in it are its own."""

    def check(self, value: str, option: str, args: argparse.Namespace) -> None:
        """Refuse what is no folder, or cannot be written to; see `Checked.check`."""
        path = Path(require_text(value))
        if os.path.lexists(path) and not path.is_dir():
            raise InputError(f"{option} {quoted(value)} is not a folder; name one, or a new one")
        require_writable(path, option)
        # Into it and next to it: a folder is replaced completely, or filled.
        if path.is_dir():
            require_writable(path / "x", option)


def require_writable(path: Path, option: str) -> None:
    """Refuse a path at which nothing can be written; nothing is left behind.

    ``path``: A file or folder, perhaps in folders that are missing too.
    """
    folder = Path(os.path.abspath(path)).parent
    missing = [path.name]
    try:
        # A folder that is missing is made when something is written, so what counts is where it will be made.
        while not os.path.lexists(folder):
            missing.append(folder.name)
            folder = folder.parent
        longest = max(len(os.fsencode(name)) for name in missing)
        if longest + _TEMPORARY_CHARACTERS > os.pathconf(folder, "PC_NAME_MAX"):
            raise InputError(
                f"{option} {quoted(str(path))}: a name of {longest} bytes is too long here; give a shorter one"
            )
        # A file without a name, which is gone when it is closed. Asking for permissions would not do: an administrator has
        # all of them, also where nothing can be written.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(
            f"{option} {quoted(str(path))} cannot be written: {quoted(str(folder))}: {reason}; name another place"
        ) from None
