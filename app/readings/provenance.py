"""Which software and which version of a file made this? For manifests, reports, and what is cached."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from depthscope.diagnostics.errors import StorageError
from depthscope.diagnostics.package_versions import package_versions
from depthscope.diagnostics.schema import LOG, is_live_store

# Those that compute or draw what a report and a bundle show.
_PACKAGES = ("depthscope", "numpy", "scipy", "xarray", "pandas", "matplotlib")


def depthscope_version() -> str:
    """The installed version; ``"0+source"`` where the code runs without being installed."""
    return software()["depthscope"]


def software() -> dict[str, str]:
    """Versions of depthscope and of those packages that compute and draw and are installed."""
    return {"depthscope": "0+source", **package_versions(_PACKAGES)}


def file_digest(path: str) -> str:
    """SHA-256 of the file of a run, or of the files of a folder by name; empty where there is nothing at the path."""
    place = Path(path) if path else None
    if place is None or not place.exists():
        return ""
    if place.is_file():
        with place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    found = hashlib.sha256()
    for each in sorted(entry for entry in place.rglob("*") if entry.is_file()):
        found.update(each.relative_to(place).as_posix().encode() + hashlib.sha256(each.read_bytes()).digest())
    return found.hexdigest()


# Linux dates a change by the tick of its clock, up to 10 ms: two changes within one have the same date. A file that was
# changed in the last 50 ms is looked at again, so that a later change has another date.
_TICK_NS = 50_000_000


@dataclass(frozen=True)
class FileVersion:
    """What identifies the files of a run: another version differs, however it came about."""

    # of device, inode, size and dates of every file: a rename gives another inode, a change in place another
    # date, and a change back of the date another date of the inode
    digest: str
    size: int  # bytes in all

    @classmethod
    def of(cls, path: Path, *others: Path) -> FileVersion:
        """The version that is there now; after a short wait where it was changed just now.

        ``path``: A file, or the folder of a store.
        ``*others``: files that belong to it, where they exist.
        Raises StorageError: Where nothing is there, or something else than files and folders: a pipe would wait for
        ever to be read.
        """

        def files() -> list[tuple[str, os.stat_result]]:
            found = list(_files(path))
            for other in others:
                # Not there, or something that is no file: then it is not read either.
                with suppress(OSError):
                    found += _files(other)
            return found

        found = files()
        newest = max((entry.st_mtime_ns for _, entry in found), default=0)
        if 0 <= time.time_ns() - newest < _TICK_NS:
            time.sleep(_TICK_NS / 1e9)
            found = files()
        facts = [
            (name, entry.st_dev, entry.st_ino, entry.st_size, entry.st_mtime_ns, entry.st_ctime_ns)
            for name, entry in found
        ]
        digest = hashlib.sha256(repr(sorted(facts)).encode("utf-8", "surrogatepass")).hexdigest()
        return cls(digest, sum(entry.st_size for _, entry in found))


def _files(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file and folder of a run, links not followed."""
    # A live store changes while it is looked at: every row is in its log, and comes after the arrays of its step.
    # A list and no recursion: folders may be nested deeper than Python's stack.
    left = [str(path / LOG if is_live_store(path) else path)]
    while left:
        name = left.pop()
        entry = os.lstat(name)
        if stat.S_ISDIR(entry.st_mode):
            left += [os.path.join(name, below) for below in os.listdir(name)]
        elif not stat.S_ISREG(entry.st_mode):
            raise StorageError(
                f"{name} is not an ordinary file, which a saved run is; remove it, or name another run"
            )
        yield name, entry
