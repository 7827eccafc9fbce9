"""How is a file or folder replaced so that it is complete at every instant? By one written next to it, and one rename."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from depthscope.diagnostics.errors import (
    InputError,
    NoFolderError,
    ProtectedError,
    SlowError,
    StorageError,
    TakenError,
)

# Scratch folders begin with this. Hidden, since a folder of runs is listed while others are written in it; the same for every
# target, since a name may already be as long as the file system allows.
SCRATCH = ".depthscope-"
SECONDS_FOR_LATE_FILES = (0.01, 0.03, 0.1, 0.3, 0.5)  # between tries to remove a folder. Heuristic.
# In every scratch folder: a file that its writer holds a kernel lock on. The kernel drops the lock when the process ends,
# however it ends, so that a lock that can be taken belongs to a dead writer.
LOCK = "lock"
# Putting a finished folder in place takes milliseconds. Whoever holds that lock for longer is stopped, not working.
PLACING_SECONDS = 60.0
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Check = Callable[[Path], object]
ListOthers = Callable[[Path], Iterable[Path]]


@contextmanager
def replaced_file(target: str | os.PathLike[str], *, check: Check | None = None) -> Iterator[Path]:
    """A fresh path whose file takes the target's place when the block ends without an error.

    The target is either the former file or the complete new one, also after a killed process or a power cut.

    ``target``: missing, or a regular file. Of a link, what it points to is replaced and the link stays.
    ``check``: called with the target, where it exists, before the block and again before the new file takes its place;
    raises where the file there must stay.
    Yields: Where to write; it has the target's name.
    Raises StorageError: Where the target is no regular file or read-only, its folder cannot be written to, or the disk
    is full.
    """
    place = require_replaceable_file(target, check)
    with _scratch_folder(place) as scratch:
        fresh = scratch / "new" / place.name
        yield fresh
        flush(fresh)
        # Once more: the block may have taken minutes.
        require_replaceable_file(place, check)
        if place.exists():
            shutil.copymode(place, fresh)  # a file that its owner made private stays private
        os.replace(fresh, place)
        _flush(place.parent)


def require_replaceable_file(target: str | os.PathLike[str], check: Check | None = None) -> Path:
    """Refuse what `replaced_file` would refuse, before anything expensive is computed; writes nothing."""
    place = require_writable(target)
    if os.path.lexists(place):
        if not stat.S_ISREG(mode := place.lstat().st_mode):
            raise TakenError(f"{place} is {kind_of(mode)}, but a file is written here; name another path")
        if check is not None:
            check(place)
    return place


@contextmanager
def replaced_folder(target: str | os.PathLike[str], *, others: ListOthers | None = None) -> Iterator[Path]:
    """A fresh folder that takes the target's place when the block ends without an error.

    Where the file system can exchange two names (Linux, macOS; not NFS), no instant is without the target. Elsewhere it is
    missing between two renames, and the next writer in that folder restores it where a process was killed there.

    ``target``: missing, or a folder. Of a link, what it points to is replaced and the link stays.
    ``others``: called with the folder that is replaced; returns the relative paths of what somebody else put there,
    which goes along unchanged; raises where the folder must stay. Called before the block, before the exchange and
    after it.
    Yields: An empty folder to write into; it has the target's name.
    Raises StorageError: Where the target cannot be replaced, its folder cannot be written to, or the disk is full.
    """
    place = require_writable(target)
    listed = others or _no_others
    if os.path.lexists(place):
        # Refused before the block, which may take minutes. Another writer may just have moved it; what counts is asked again
        # under the lock.
        with suppress(FileNotFoundError):
            listed(place)
        if os.path.ismount(place):
            raise StorageError(f"{place} is a mount point, which cannot be replaced; name a folder inside it")
    with _scratch_folder(place) as scratch:
        fresh = scratch / "new" / place.name
        fresh.mkdir()
        yield fresh
        # One writer after the other: what the second one carries along, the first has finished.
        with one_at_a_time(place, "replacing", seconds=PLACING_SECONDS):
            _place_folder(fresh, place, scratch / "old" / place.name, listed)


def _no_others(place: Path) -> Iterable[Path]:
    if not stat.S_ISDIR(mode := place.lstat().st_mode):
        raise TakenError(f"{place} is {kind_of(mode)}, but a folder is written here; name another path")
    return ()


def _place_folder(fresh: Path, place: Path, aside: Path, others: ListOthers) -> None:
    if os.path.lexists(place):
        for name in others(place):
            _carry(place, fresh, name)
        if place.is_dir():
            shutil.copymode(place, fresh)  # a folder that its owner made private stays private
    flush(fresh)
    former = _put(fresh, place, aside)
    if former is not None:
        try:
            # What appeared or was changed between the look above and the exchange; a rename, so that nothing is lost.
            for name in others(former):
                _carry_late(former, place, name)
        except BaseException:
            _put(former, place, fresh)  # back, as if nothing had been written
            raise
    _flush(place.parent)


def _carry(old: Path, new: Path, name: Path) -> None:
    """Put what is at ``old/name`` at ``new/name`` too, without moving it: until the exchange the old folder stays complete."""
    source, goal = old / name, new / name
    if os.path.lexists(goal):
        # Refused before the exchange, so that the folder is as it was.
        raise InputError(f"{source} was not written by depthscope and is in the way; rename it")
    _make_parents(old, new, name)
    mode = source.lstat().st_mode
    if stat.S_ISDIR(mode):
        goal.mkdir()
        shutil.copymode(source, goal)
        return
    try:
        os.link(source, goal, follow_symlinks=False)  # a link counts as itself
    except (OSError, NotImplementedError):
        # Some file systems have no hard links, and Linux refuses them for files of another owner. Reading a pipe would hang.
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            what = kind_of(mode)
            raise InputError(f"{source} is {what}, which cannot be carried along; move it away") from None
        shutil.copy2(source, goal, follow_symlinks=False)


def _carry_late(old: Path, new: Path, name: Path) -> None:
    source, goal = old / name, new / name
    if os.path.lexists(goal):
        if stat.S_ISDIR(source.lstat().st_mode) or os.path.samestat(source.lstat(), goal.lstat()):
            return
    else:
        _make_parents(old, new, name)
    os.replace(source, goal)


def _make_parents(old: Path, new: Path, name: Path) -> None:
    """Make the folders above ``new/name`` that are only in the old folder, with the modes that they have there."""
    for parent in list(reversed(name.parents))[1:]:
        if not (new / parent).is_dir():
            (new / parent).mkdir()
            shutil.copymode(old / parent, new / parent)


def _put(fresh: Path, place: Path, aside: Path) -> Path | None:
    """Put a folder in place; returns where the former one is then, or None where there was none."""
    if not os.path.lexists(place):
        os.rename(fresh, place)
        return None
    if exchange(fresh, place):
        return fresh
    aside.parent.mkdir(exist_ok=True)
    try:
        os.rename(place, aside)
        os.rename(fresh, place)
    except BaseException:
        # Ctrl-C may come between the two. Killed between them, `remove_litter` does this.
        if os.path.lexists(aside) and not os.path.lexists(place):
            os.rename(aside, place)
        raise
    return aside


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, such that each exists at every instant.

    Returns: False where this system or file system cannot.
    Raises StorageError: Where it can but did not, such as for a missing file.
    """
    call = _exchange_call()
    if call is None:
        return False
    if call(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    number = ctypes.get_errno()
    # EINVAL is what a file system without exchange answers (NFS, some FUSE), ENOSYS an old kernel or a sandbox.
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@cache
def _exchange_call() -> Callable[[bytes, bytes], int] | None:
    """The system's call for it; Python's `os` has none."""
    if sys.platform == "win32":
        return None
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        libc.renamex_np.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint)
        return lambda one, other: libc.renamex_np(one, other, 2)  # RENAME_SWAP
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        name = (ctypes.c_int, ctypes.c_char_p)
        libc.renameat2.argtypes = (*name, *name, ctypes.c_uint)
        here = -100  # AT_FDCWD: the names are complete paths
        return lambda one, other: libc.renameat2(here, one, here, other, 2)  # RENAME_EXCHANGE
    return None


def require_writable(target: str | os.PathLike[str]) -> Path:
    """Where a target really is, refused where nothing can be written there; nothing is written or made.

    ``target``: A file or folder, perhaps missing; its links are followed.
    Raises StorageError: For a circle of links, a parent that is no folder, and what is write-protected.
    """
    place = Path(os.path.realpath(target))
    if place.is_symlink():
        raise StorageError(f"{target} is a link that leads in a circle; remove it, or name another path")
    # Asked three times: without an exchange of names the target is missing for an instant while another writer replaces it.
    if all(os.path.lexists(place) and not os.access(place, os.W_OK) for _ in range(3)):
        raise ProtectedError(
            f"{target} is write-protected; allow it with: chmod u+w {target}, or name another path"
        )
    # The folders that are missing are made later: asked is the one that they are made in.
    folder = next(parent for parent in place.parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise NoFolderError(f"{folder} is a file, but {target} asks for a folder of that name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ProtectedError(f"no permission to write in {folder}; name a path in another folder")
    return place


def entries_below(folder: Path) -> Iterator[Path]:
    """Every file, link and special file below a folder, and its empty folders.

    Yields: Path below the folder; those of each folder in alphabetical order.
    """
    waiting = [folder]  # no recursion: folders may be nested a thousand deep
    while waiting:
        present = waiting.pop()
        entries = sorted(present.iterdir())
        if not entries and present != folder:
            yield present.relative_to(folder)
        for entry in entries:
            if stat.S_ISDIR(entry.lstat().st_mode):
                waiting.append(entry)
            else:
                yield entry.relative_to(folder)


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


@contextmanager
def _scratch_folder(place: Path) -> Iterator[Path]:
    """A locked scratch folder next to a target; removed at the end with all that is left in it."""
    with _full_disk_named(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_litter(place.parent)
        scratch, lock = _locked_scratch(place.parent)
        try:
            (scratch / "new").mkdir()
            yield scratch
        finally:
            _discard(scratch, lock)


def _locked_scratch(parent: Path) -> tuple[Path, Any]:
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
        try:
            return scratch, _lock(scratch, seconds=0.0)
        except TimeoutError:
            continue  # between the two lines another writer took it for litter
        except BaseException:
            with suppress(OSError):  # no room for a lock: it is empty
                scratch.rmdir()
            raise


def _lock(scratch: Path, *, seconds: float) -> Any:
    """The lock of a scratch folder, held; None on file systems that have no locks.

    Where there are none, litter stays: nobody can tell whether its writer lives.
    """
    # Imported here: it takes 40 ms, and those who only read need none.
    from filelock import FileLock, Timeout

    lock = FileLock(scratch / LOCK)
    end = time.monotonic() + seconds
    while True:
        try:
            lock.acquire(timeout=max(0.0, end - time.monotonic()), poll_interval=0.01)
        except (Timeout, FileNotFoundError, FileExistsError) as error:
            # The one before has just removed the folder with its lock, while `acquire` was making or opening it.
            if isinstance(error, Timeout) or time.monotonic() >= end:
                raise SlowError(f"{scratch} is locked by another writer") from None
            continue
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return None
        return lock


@contextmanager
def _full_disk_named(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        # h5py and zarr name a scratch file or nothing at all.
        reason = f"{os.strerror(error.errno)}; what was there before is unchanged"
        raise StorageError(error.errno, reason, str(place)) from error


@contextmanager
def one_at_a_time(target: Path, work: str, *, seconds: float) -> Iterator[None]:
    """Hold what only one process (and thread) may hold for a target; the others wait.

    ``target``: what is worked on; its folder must exist.
    ``work``: what is done, such as ``"converting"``: one process at a time does it, while others may do other work.
    """
    # A name of its own for every name, of a length that every file system takes.
    name = hashlib.sha256(os.fsencode(f"{work} {target.name}")).hexdigest()[:16]
    scratch = target.parent / f"{SCRATCH}{name}"
    try:
        lock = _lock(scratch, seconds=seconds)
    except TimeoutError:
        message = f"another process has been {work} {target} for {seconds:g} s; end it, or try again later"
        raise SlowError(message) from None
    try:
        yield
    finally:
        _discard(scratch, lock)


def remove_litter(folder: Path) -> None:
    """Remove what killed writers left in a folder, and restore what they had moved aside; living ones are left alone."""
    with os.scandir(folder) as entries:
        found = [Path(entry.path) for entry in entries if entry.name.startswith(SCRATCH) and _is_ours(entry)]
    for scratch in found:
        # One that is held, or cannot be removed now, is left for the next call. A timeout is an OSError too.
        with suppress(OSError):
            lock = _lock(scratch, seconds=0.0)
            if lock is not None:
                _restore(scratch, folder)
                _discard(scratch, lock)


def _is_ours(entry: os.DirEntry[str]) -> bool:
    try:
        is_folder, owner = entry.is_dir(follow_symlinks=False), entry.stat(follow_symlinks=False).st_uid
    except OSError:  # its writer has just finished
        return False
    # That of another user in a shared folder is theirs to remove.
    return is_folder and (not hasattr(os, "geteuid") or owner == os.geteuid())


def _restore(scratch: Path, folder: Path) -> None:
    """Where a writer was killed between its two renames, put back what it had moved aside."""
    for aside in (scratch / "old").iterdir() if (scratch / "old").is_dir() else ():
        # Only where the new one was not yet put in place; after that the old one may be half removed.
        if (scratch / "new" / aside.name).exists() and not os.path.lexists(folder / aside.name):
            os.rename(aside, folder / aside.name)


def _discard(scratch: Path, lock: Any) -> None:
    """Remove a scratch folder under its lock; the lock goes last, so that nobody else begins in the middle."""
    try:
        folders = scratch / "new", scratch / "old"
        # A background thread of a writer that was interrupted may still add a file, on a busy machine for a while.
        for pause in (0.0, 0.0, 0.0, *SECONDS_FOR_LATE_FILES):
            if pause and not any(folder.exists() for folder in folders):
                break
            time.sleep(pause)
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
        if lock is not None and os.name == "nt":  # an open file cannot be removed there
            lock.release()
        # Once and no second time: the file that is there after this may be the lock of the next one who waited for it.
        with suppress(OSError):
            (scratch / LOCK).unlink(missing_ok=True)
            # Not empty where somebody waits for this lock, or a file came late; whoever looks here next removes it.
            scratch.rmdir()
    finally:
        if lock is not None:
            lock.release()  # also where Ctrl-C comes here; the next writer removes what is left


def flush(path: Path) -> None:
    """Have the system write a file, or a folder with all its files, to the disk; else a power cut leaves empty files."""
    below = (Path(folder) / name for folder, *names in os.walk(path) for each in names for name in each)
    paths = [path, *below]
    # Opening a pipe would wait for its writer; Windows opens no folder.
    known = (stat.S_ISREG,) if os.name == "nt" else (stat.S_ISREG, stat.S_ISDIR)
    paths = [each for each in paths if any(is_kind(each.lstat().st_mode) for is_kind in known)]
    # Together: the file system then commits many files at once (90 files in 0.1 s; in 0.8 s one after the other).
    with ThreadPoolExecutor(min(len(paths) or 1, 16)) as threads:
        list(threads.map(_flush, paths))


def _flush(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    except PermissionError:
        return  # a file of somebody else that goes along and was on the disk before; on Windows, any folder
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems have no fsync for folders; a disk that is full or broken is an error.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
