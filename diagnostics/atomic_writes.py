"""How is a file or folder written so that it is complete at every instant? By a rename; and nothing of others is touched.

What is written gets its name by a rename from a scratch folder next to it. A scratch folder that a killed process left is
removed by the next writer only where the user's state folder records that this user's process made it: nothing in a folder
that somebody sends can be taken for one. Below a folder no link is followed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from depthscope.diagnostics.errors import (
    NoFolderError,
    ProtectedError,
    SlowError,
    StorageError,
    TakenError,
)

try:
    import fcntl
except ImportError:  # Windows: what a killed process left stays there
    fcntl = None  # type: ignore[assignment]

SCRATCH = ".depthscope-"
"""Scratch folders begin with this: hidden, since a folder of runs is listed while others are written in it."""

PLACING_SECONDS = 60.0
"""Putting a finished folder in place takes milliseconds: whoever takes longer is stopped, not working."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Check = Callable[[Path], object]
"""Raises where what is at a path must stay."""


# --- writing


@contextmanager
def replaced_file(target: str | os.PathLike[str], *, check: Check | None = None) -> Iterator[Path]:
    """A fresh path whose file takes the target's place when the block ends without an error.

    ``target``: missing, or a regular file. Of a link, what it points to is replaced and the link stays.
    ``check``: called with the target, where it exists, before the block and again before the new file takes its place.
    Yields: Where to write; it has the target's name.
    Raises StorageError: Where the target is no regular file or read-only, its folder cannot be written to, or the disk
    is full.
    """
    place = _checked(target, stat.S_ISREG, "a file", check)
    with _scratch_folder(place) as (scratch, move):
        fresh = scratch / "new" / place.name
        yield fresh
        _flush(fresh)
        _checked(place, stat.S_ISREG, "a file", check)  # the block may have taken minutes
        if place.exists():
            shutil.copymode(place, fresh)  # a file that its owner made private stays private
        move(f"{scratch.name}/new/{place.name}", place.name)
        _flush_one(place.parent)


@contextmanager
def replaced_folder(target: str | os.PathLike[str], *, check: Check | None = None) -> Iterator[Path]:
    """A fresh folder that takes the target's place when the block ends without an error.

    The former folder is renamed into the scratch folder, then the new one is renamed to the target. Where a process is killed
    between the two, the next writer in that folder puts the former one back.

    ``target``: missing, an empty folder, or one that `check` allows to replace. Of a link, what it points to is replaced.
    ``check``: called with a folder that has anything in it, before the block, before it is moved and after it was moved.
    Without one such a folder is refused.
    Yields: An empty folder to write into; it has the target's name.
    Raises StorageError: As of `replaced_file`.
    """

    def allowed(place: Path) -> None:
        if os.listdir(place):
            if check is None:
                raise TakenError(f"{place} has files in it; name a new folder")
            check(place)

    place = _checked(target, stat.S_ISDIR, "a folder", allowed)
    with _scratch_folder(place) as (scratch, move):
        fresh = scratch / "new" / place.name
        fresh.mkdir()
        yield fresh
        _flush(fresh)
        with _alone_in_replacing(place):
            if os.path.lexists(_checked(place, stat.S_ISDIR, "a folder", allowed)):
                shutil.copymode(place, fresh)
                move(place.name, f"{scratch.name}/old")
            try:
                if os.path.lexists(scratch / "old"):
                    allowed(scratch / "old")  # what appeared in it meanwhile
                move(f"{scratch.name}/new/{place.name}", place.name)
            except BaseException:
                if os.path.lexists(scratch / "old"):
                    move(f"{scratch.name}/old", place.name)  # back, as if nothing had been written
                raise
        _flush_one(place.parent)


def require_writable(target: str | os.PathLike[str]) -> Path:
    """Where a target really is, refused where nothing can be written there; nothing is left behind.

    ``target``: A file or folder, perhaps missing; its links are followed.
    Raises StorageError: For a circle of links, a parent that is no folder, and what is write-protected.
    """
    place = Path(os.path.realpath(target))
    if place.is_symlink():
        raise StorageError(f"{target} is a link that leads in a circle; remove it, or name another path")
    if os.path.lexists(place) and not os.access(place, os.W_OK):
        raise ProtectedError(
            f"{target} is write-protected; allow it with: chmod u+w {target}, or name another path"
        )
    # The folders that are missing are made later: tried is the one that they are made in.
    folder = next(parent for parent in place.parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise NoFolderError(f"{folder} is a file, but {target} asks for a folder of that name")
    try:
        # With a file, which has no name and is gone at once: an administrator has every permission, also in /proc.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in FULL:
            return place
        reason = (error.strerror or str(error)).lower()
        raise ProtectedError(
            f"nothing can be written in {folder} ({reason}); name a path in another folder"
        ) from None
    return place


def _checked(
    target: str | os.PathLike[str], is_kind: Callable[[int], bool], kind: str, check: Check | None
) -> Path:
    place = require_writable(target)
    if os.path.lexists(place):
        if not is_kind(mode := place.lstat().st_mode):
            raise TakenError(f"{place} is {kind_of(mode)}, but {kind} is written here; name another path")
        if check is not None:
            check(place)
    return place


# --- scratch folders, and those that killed processes left


@contextmanager
def _scratch_folder(place: Path) -> Iterator[tuple[Path, Callable[[str, str], None]]]:
    """A scratch folder next to a target, removed at the end with all that is in it; and what renames in their folder."""
    with _full_disk_named(place), ExitStack() as stack:
        base, folder = stack.enter_context(_opened(made_folder(place.parent)))
        with suppress(OSError):
            _remove_litter()
        scratch = place.parent / f"{SCRATCH}{uuid.uuid4().hex}"
        record = stack.enter_context(_record(scratch))
        os.mkdir(base + scratch.name, 0o700, dir_fd=folder)
        stack.callback(_remove_tree, base + scratch.name, folder)
        if record is not None:
            status = scratch.lstat()
            facts = {"folder": str(scratch), "target": place.name, "id": [status.st_dev, status.st_ino]}
            record.write(json.dumps({**facts, "host": socket.gethostname()}).encode())
            record.flush()
        (scratch / "new").mkdir()

        def move(source: str, goal: str) -> None:
            os.replace(base + source, base + goal, src_dir_fd=folder, dst_dir_fd=folder)

        yield scratch, move


@contextmanager
def _record(scratch: Path) -> Iterator[IO[bytes] | None]:
    """A file in the state folder, locked as long as this process lives; None where the state folder cannot be used."""
    path = None
    with ExitStack() as stack:
        record = None
        with suppress(OSError):
            path = own_folder(state_folder() / "scratch") / scratch.name.removeprefix(SCRATCH)
            record = stack.enter_context(path.open("xb"))
            if fcntl is not None:
                fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield record
        finally:
            if path is not None and not os.path.lexists(scratch):
                path.unlink(missing_ok=True)


def _remove_litter() -> None:
    """Remove the scratch folders that killed processes of this user and machine left, as they are recorded."""
    for path in (state_folder() / "scratch").iterdir() if fcntl is not None else ():
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError), path.open("rb") as record:
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its process lives
            facts = json.loads(record.read(1 << 16) or b"{}")
            if facts.get("host", socket.gethostname()) == socket.gethostname():
                if facts:  # else it was killed before it knew which folder it had made, which is empty
                    _remove_recorded(Path(facts["folder"]), facts["target"], facts["id"])
                path.unlink(missing_ok=True)


def _remove_recorded(scratch: Path, target: str, identity: list[int]) -> None:
    with suppress(FileNotFoundError), _opened(scratch.parent) as (base, folder):
        status = os.stat(base + scratch.name, dir_fd=folder, follow_symlinks=False)
        if [status.st_dev, status.st_ino] != identity:
            return  # another one of that name
        # Killed between its two renames: what was there before is put back.
        if os.path.lexists(scratch / "old") and not os.path.lexists(scratch.parent / target):
            os.rename(f"{base}{scratch.name}/old", base + target, src_dir_fd=folder, dst_dir_fd=folder)
        _remove_tree(base + scratch.name, folder)


def _remove_tree(name: str, folder: int | None) -> None:
    # A background thread of a writer that was interrupted may still add a file, on a busy machine for a while.
    for pause in (0.0, 0.01, 0.1, 0.5):
        time.sleep(pause)
        shutil.rmtree(name, ignore_errors=True, dir_fd=folder)
        try:
            os.stat(name, dir_fd=folder, follow_symlinks=False)
        except OSError:
            return


# --- folders


@contextmanager
def _opened(folder: Path, below: str = "") -> Iterator[tuple[str, int | None]]:
    """What names of files in a folder begin with, and a descriptor of it for ``dir_fd``; a link below it is refused.

    What was opened is what is used: a folder that is replaced by a link meanwhile leads nowhere. Windows has no descriptors
    of folders: there names begin with the path.
    """
    path = folder / below
    if below and not stat.S_ISDIR(mode := path.lstat().st_mode):
        raise TakenError(f"{path} is {kind_of(mode)}; expected a folder")
    if os.open not in os.supports_dir_fd:
        yield f"{path}{os.sep}", None
        return
    with ExitStack() as stack:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, opened)
        if below:
            opened = os.open(below, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=opened)
            stack.callback(os.close, opened)
        yield "", opened


def open_below(folder: Path, name: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of an ordinary file of a folder, or of a folder in it, to which no link in there leads."""
    below, _, leaf = name.rpartition("/")
    # A pipe would wait for its other end. Windows has none of these.
    for each in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, each, 0)
    with _opened(folder, below) as (base, opened):
        descriptor = os.open(base + leaf, flags, 0o666, dir_fd=opened)
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise TakenError(f"{folder / name} is {kind_of(mode)}; expected a file")
    return descriptor


def remove_below(folder: Path, name: str) -> None:
    """Remove a file, or an empty folder, of a folder where it is there; what links in there lead to stays."""
    below, _, leaf = name.rpartition("/")
    with suppress(FileNotFoundError), _opened(folder, below) as (base, opened):
        is_folder = stat.S_ISDIR(os.stat(base + leaf, dir_fd=opened, follow_symlinks=False).st_mode)
        (os.rmdir if is_folder else os.unlink)(base + leaf, dir_fd=opened)


def entries_below(folder: Path) -> Iterator[Path]:
    """Every file, link and special file below a folder, and its empty folders, as paths below the folder."""
    for place, folders, files in os.walk(folder, followlinks=False):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        here = Path(place).relative_to(folder)
        yield from (here / name for name in sorted([*links, *files]))
        if not folders and not files and here.parts:
            yield here


def made_folder(path: Path, mode: int = 0o777) -> Path:
    """A folder, made with those above it where it is missing."""
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    return path


def own_folder(path: Path) -> Path:
    """A folder of this user's, made where it is missing.

    Raises ProtectedError: Where others could have put something into it.
    """
    made_folder(path, 0o700)
    if not hasattr(os, "geteuid"):  # Windows: a profile's folders are private, and their modes say nothing
        return path
    if path.stat().st_uid != os.geteuid():
        raise ProtectedError(f"{path} is owned by another user")
    for each in (path.parent, path):
        # In a sticky folder, as /tmp is, others can make files but not replace ours.
        if (mode := each.stat().st_mode) & 0o022 and not mode & stat.S_ISVTX:
            raise ProtectedError(f"others may write in {each}; end that with: chmod go-w {each}")
    return path


def state_folder() -> Path:
    """Where a user's programs keep what they did."""
    return _home("XDG_STATE_HOME", ".local/state")


def cache_folder() -> Path:
    """Where a user's programs keep what can be made anew."""
    return _home("XDG_CACHE_HOME", ".cache")


def _home(variable: str, default: str) -> Path:
    chosen = os.environ.get(variable, "")  # a relative path is to be ignored, as XDG has it
    return (Path(chosen) if os.path.isabs(chosen) else Path.home() / default) / "depthscope"


@contextmanager
def _alone_in_replacing(target: Path) -> Iterator[None]:
    """Hold what only one process of this user may hold for a target; the others wait, where that can be known."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(target))).hexdigest()
    with ExitStack() as stack:
        lock = None
        with suppress(OSError):
            lock = stack.enter_context((own_folder(state_folder() / "locks") / name).open("ab"))
        end = time.monotonic() + PLACING_SECONDS
        while fcntl is not None and lock is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise SlowError(
                        f"another process has been replacing {target} for {PLACING_SECONDS:g} s; end it, or try again later"
                    ) from None
                time.sleep(0.05)
        yield


def kind_of(mode: int) -> str:
    """What kind of file a mode is of, for a message."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a link",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        **dict.fromkeys((stat.S_IFCHR, stat.S_IFBLK), "a device"),
    }
    return kinds.get(stat.S_IFMT(mode), "a file")


# --- the disk


@contextmanager
def _full_disk_named(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        # zarr names a scratch file or nothing at all.
        reason = f"{os.strerror(error.errno)}; what was there before is unchanged"
        raise StorageError(error.errno, reason, str(place)) from error


def _flush(path: Path) -> None:
    """Have the system write a file, or a folder with all its files, to the disk; else a power cut leaves empty files."""
    paths = [
        path,
        *(Path(place) / name for place, *names in os.walk(path) for each in names for name in each),
    ]
    # Together: the file system then commits many files at once (90 files in 0.1 s; in 0.8 s one after the other).
    with ThreadPoolExecutor(min(len(paths), 16)) as threads:
        list(threads.map(_flush_one, paths))


def _flush_one(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    except PermissionError:
        return  # on Windows, any folder
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems have no fsync for folders; a disk that is full or broken is an error.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
