"""What is in the folder of a live store, and who writes it? Names, files without links, and the writer's kernel lock."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from depthscope.diagnostics.atomic_writes import NO_LOCKS, SCRATCH, kind_of, remove_below
from depthscope.diagnostics.errors import AbsentError, BusyError, TakenError
from depthscope.diagnostics.schema.limits import require_dense
from depthscope.diagnostics.schema.validation import SchemaError

LOG = "depthscope-rows.log"
"""The row log, by which the folder is known."""

LOCK = "writer.lock"
COLUMNS, STATES = "columns", "states"
"""Folders of the files with older rows, and of the runs with the arrays of one step."""

NUMBERED = re.compile(rf"({COLUMNS}/(\d{{6,9}})\.cols|{STATES}/(\d{{6,9}})\.zarr\.zip)")
_ON_WINDOWS = os.name == "nt"


def is_live_store(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the folder of a live store, finished or not."""
    try:
        return stat.S_ISREG((Path(path) / LOG).lstat().st_mode)
    except OSError:
        return False


def live_log_of(path: Path) -> Path:
    """The live store next to a file that is written when the training ends; it is there as long as the file is not."""
    return path.with_name(f"{path.name}.live")


def number_of(name: str) -> int:
    """The number of a file of columns or of a state, from its path below the store."""
    return int(Path(name).name.partition(".")[0])


def newest_state(store: Path) -> Path | None:
    """The newest file with the arrays of one step; None where none was saved yet."""
    states = [name for name in files_of(store)[0] if name.startswith(STATES)]
    return store / max(states, key=number_of) if states else None


def files_of(store: Path) -> tuple[set[str], str | None]:
    """The numbered files in a folder, and one thing in it that no live store has, by their paths below the folder."""
    names: set[str] = set()
    foreign = None
    with _opened_folders(store) as (place, _):
        for entry, is_folder, is_file in _entries(place):
            if entry in (COLUMNS, STATES) and is_folder:
                with _opened_folders(store, entry) as (inner, _):
                    for name, _, is_inner_file in _entries(inner):
                        full = f"{entry}/{name}"
                        if NUMBERED.fullmatch(full) and is_inner_file:
                            names.add(full)
                        else:
                            foreign = full
            elif not (entry in (LOG, LOCK) and is_file):
                foreign = entry
    return names, foreign


def _entries(place: int | Path) -> Iterator[tuple[str, bool, bool]]:
    """Name, whether it is a folder, and whether it is an ordinary file, of what is in a folder; links are neither."""
    with os.scandir(place) as entries:
        for entry in entries:
            # Of a writer that was killed while it replaced a file; and what NFS makes of a removed file that is being read.
            if not entry.name.startswith((SCRATCH, ".nfs")):
                yield entry.name, entry.is_dir(follow_symlinks=False), entry.is_file(follow_symlinks=False)


@contextmanager
def _opened_folders(store: Path, folder: str = "") -> Iterator[tuple[Any, int | None]]:
    """A store, or a folder in it, for `os.scandir`, and its descriptor for ``dir_fd``; a link inside the store is refused.

    What was opened is what is read: a folder that is replaced by a link meanwhile leads nowhere. Windows has no descriptors
    of folders, and is asked before.
    """
    path = store / folder if folder else store
    if folder and not stat.S_ISDIR(mode := path.lstat().st_mode):
        raise SchemaError(f"{path} is {kind_of(mode)}; expected a folder")
    if os.open not in os.supports_dir_fd:
        yield path, None
        return
    with ExitStack() as stack:
        opened = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, opened)
        if folder:
            opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=opened)
            stack.callback(os.close, opened)
        yield opened, opened


def open_inside(store: Path, name: str) -> IO[bytes]:
    """Open a file of a store for reading: an ordinary one, to which no link in the store leads.

    Raises SchemaError where it is a link, a pipe or anything else, and OSError where it cannot be opened.
    """
    folder, _, leaf = name.rpartition("/")
    with _opened_folders(store, folder) as (_, descriptor):
        target = leaf if descriptor is not None else store / name
        try:
            mode = os.stat(target, dir_fd=descriptor, follow_symlinks=False).st_mode
            if not stat.S_ISREG(mode):
                raise SchemaError(f"{store / name} is {kind_of(mode)}; expected a file")
            # A link or a pipe may have come meanwhile. Windows has neither flag.
            flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            file = os.fdopen(os.open(target, os.O_RDONLY | flags, dir_fd=descriptor), "rb")
        except FileNotFoundError as error:
            raise AbsentError(errno.ENOENT, error.strerror, str(store / name)) from None
    try:
        entry = os.fstat(file.fileno())
        if not stat.S_ISREG(entry.st_mode):
            raise SchemaError(f"{store / name} is {kind_of(entry.st_mode)}; expected a file")
        require_dense(store / name, entry)
    except SchemaError:
        file.close()
        raise
    return file


def require_no_link(store: Path, folder: str) -> None:
    """Refuse to write into a folder of a store that is a link, or no folder."""
    path = store / folder
    if os.path.lexists(path) and not stat.S_ISDIR(mode := path.lstat().st_mode):
        raise TakenError(f"{path} is {kind_of(mode)}, expected a folder; move it away")


def remove_inside(store: Path, name: str) -> None:
    """Remove a file of a store where it is there; what links in the store lead to stays."""
    remove_below(store, name)


# --- the writer's lock


class WriterLock:
    """A kernel lock on a store, which ends with the process that holds it, however that ends.

    Raises BlockingIOError where another recorder holds it, of this process or of another one.
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
            raise BusyError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
        return
    import fcntl

    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def is_being_written(store: Path) -> bool:
    """Whether a process holds the lock of a store; false too where the file system has no locks."""
    try:
        with open_inside(store, LOCK) as file:
            _lock(file.fileno(), shared=True)
    except BlockingIOError:
        return True
    except (OSError, SchemaError):
        return False
    return False
