"""What is in the folder of a live store, and who writes it? Names, files without links, and the writer's kernel lock."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
import weakref
from pathlib import Path
from typing import IO, Any

from depthscope.diagnostics.atomic_writes import NO_LOCKS, SCRATCH, entries_below, kind_of
from depthscope.diagnostics.schema.validation import SchemaError

LOG = "depthscope-rows.log"
"""The row log, by which the folder is known."""

LOCK = "writer.lock"
COLUMNS, STATES = "columns", "states"
"""Folders of the files with older rows, and of the runs with the arrays of one step."""

_OWN = re.compile(rf"{re.escape(LOG)}|{LOCK}|{COLUMNS}/\d{{6,9}}\.cols|{STATES}/\d{{6,9}}\.nc")
_ON_WINDOWS = os.name == "nt"


def is_live_store(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the folder of a live store, finished or not.

    Parameters
    ----------
    path : path-like
        Anything.

    Returns
    -------
    bool
    """
    try:
        return stat.S_ISREG((Path(path) / LOG).lstat().st_mode)
    except OSError:
        return False


def live_log_of(path: Path) -> Path:
    """Where the rows of a run are that is written as a file when the training ends.

    Parameters
    ----------
    path : Path
        Of the file.

    Returns
    -------
    Path
        A live store next to it, as long as there is no file.
    """
    return path.with_name(f"{path.name}.live")


def numbered(folder: Path, suffix: str) -> dict[int, Path]:
    """The files of one of the store's folders by their number, in order.

    Parameters
    ----------
    folder : Path
        `COLUMNS` or `STATES` of a store.
    suffix : str
        ``".cols"`` or ``".nc"``.

    Returns
    -------
    dict of int to Path
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = [name for name in names if re.fullmatch(rf"\d{{6,9}}{re.escape(suffix)}", name)]
    return {int(name.removesuffix(suffix)): folder / name for name in found}


def newest_state(store: Path) -> Path | None:
    """The newest file with the arrays of one step.

    Parameters
    ----------
    store : Path
        The folder.

    Returns
    -------
    Path or None
        None where none was saved yet.
    """
    return next(reversed(numbered(store / STATES, ".nc").values()), None)


def has_older_rows(store: Path) -> bool:
    """Whether some rows of a store are in files of columns.

    Parameters
    ----------
    store : Path
        The folder.

    Returns
    -------
    bool
    """
    return bool(numbered(store / COLUMNS, ".cols"))


def foreign_file(store: Path) -> str | None:
    """What is in a folder and in no live store.

    Parameters
    ----------
    store : Path
        A folder.

    Returns
    -------
    str or None
        Path below the folder of the first one.
    """
    for entry in entries_below(store):
        name = entry.as_posix()
        # What a writer leaves that was killed while it replaced a file, and the folders that it had just made.
        if any(part.startswith(SCRATCH) for part in entry.parts) or name in (COLUMNS, STATES):
            continue
        if not (_OWN.fullmatch(name) and stat.S_ISREG((store / entry).lstat().st_mode)):
            return name
    return None


def open_inside(path: Path) -> IO[bytes]:
    """Open a file of a store for reading: an ordinary one, which no link leads to.

    Parameters
    ----------
    path : Path
        Of the file.

    Returns
    -------
    file

    Raises
    ------
    SchemaError
        Where it is a link, a pipe or anything else.
    OSError
        Where it cannot be opened.
    """
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode):
        raise SchemaError(f"{path} is {kind_of(mode)}; expected a file")
    # Again while it is opened: a link or a pipe may have come meanwhile. Windows has neither flag.
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, os.O_RDONLY | flags), "rb")


# --- the writer's lock


class WriterLock:
    """A kernel lock on a store, which ends with the process that holds it, however that ends.

    Parameters
    ----------
    store : Path
        The folder, which exists.

    Raises
    ------
    BlockingIOError
        Where another recorder holds it, of this process or of another one.
    """

    def __init__(self, store: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        self._descriptor: int | None = os.open(store / LOCK, flags, 0o666)
        try:
            _lock_soon(self._descriptor)
        except OSError as error:
            # Where a file system has no locks, a second writer is not noticed.
            if error.errno not in NO_LOCKS:
                self.release()
                raise
        _held.add(self)

    def release(self) -> None:
        """Let others write; calling it twice is fine."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _release_in_child() -> None:
    # A child shares the lock: a worker that outlives a killed trainer would hold it. Closing it there leaves the parent's.
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_release_in_child)


def _lock_soon(descriptor: int) -> None:
    for _ in range(20):
        try:
            return _lock(descriptor)
        except BlockingIOError:
            time.sleep(0.01)  # a reader holds it for an instant, to see whether somebody writes
    return _lock(descriptor)


def _lock(descriptor: int, *, shared: bool = False) -> None:
    """Take the lock or raise BlockingIOError."""
    if _ON_WINDOWS:
        import msvcrt

        windows: Any = msvcrt
        try:
            windows.locking(descriptor, windows.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
        return
    import fcntl

    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def is_being_written(store: Path) -> bool:
    """Whether a process holds the lock of a store; false too where the file system has no locks.

    Parameters
    ----------
    store : Path
        The folder.

    Returns
    -------
    bool
    """
    try:
        with open_inside(store / LOCK) as file:
            _lock(file.fileno(), shared=True)
    except BlockingIOError:
        return True
    except (OSError, SchemaError):
        return False
    return False
