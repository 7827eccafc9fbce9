"""Which files in a folder of results are ours? Those that its manifest names; a new export carries all others along."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from depthscope.diagnostics import atomic_writes
from depthscope.diagnostics.errors import InputError

MANIFEST = "manifest.json"
MADE_BY = "depthscope export"
# Bytes; a manifest of ours takes some hundred for each file and a few thousand for each run (a heuristic of ours).
MANIFEST_LIMIT = 64 << 20


@contextmanager
def replaced_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A fresh folder that takes the target's place when the block ends without an error.

    Files in the target that an earlier run did not write go along, unchanged; no instant is without them.

    ``target``: missing, empty, or a bundle of an earlier run.
    ``force``: replace files of that bundle that were edited, too; files of others stay in any case.
    Raises InputError: For a folder of somebody else, a bundle whose files were edited, or a fresh file with the name of
    a foreign one.
    """
    others = partial(foreign_files, force=force)
    with atomic_writes.replaced_folder(target, others=others) as fresh:
        yield fresh


def foreign_files(target: Path, *, force: bool = False) -> list[Path]:
    """What is in a folder and not named by its manifest: files, links, and folders with nothing in them.

    ``force``: whether edited files of ours are taken as they were written.
    Raises InputError: For a file, a folder of somebody else, or one with files of ours that were edited.
    """
    if not target.is_dir():
        raise InputError(f"{target} is a file; name a folder to write to")
    # An empty folder belongs to nobody.
    if not os.listdir(target):
        return []
    # Read before all files are listed, which are many where somebody names a home folder.
    written = _written(target)
    foreign = []
    for name in atomic_writes.entries_below(target):
        if name.as_posix() not in written:
            foreign.append(name)
        # Edited by hand is work that an export would destroy.
        elif not force and not _is_as_written(target / name, written[name.as_posix()]):
            raise InputError(
                f"{target / name} was edited after depthscope wrote it; "
                "rename it, choose another folder with --out, or replace it with --force"
            )
    return foreign


def _is_as_written(path: Path, digest: str | None) -> bool:
    # A link or a pipe was not written by an export, and reading a pipe would wait for ever.
    return stat.S_ISREG(path.lstat().st_mode) and digest in (None, sha256(path))


def is_own_file(folder: Path, name: str) -> bool:
    """Whether a name of a manifest is a file below its folder: no link leads elsewhere, no pipe would wait for ever."""
    path = folder / name
    return path.is_file() and not path.is_symlink() and path.resolve().is_relative_to(folder.resolve())


def manifest_of(target: Path) -> dict[str, Any]:
    """The manifest of a bundle."""
    _written(target)  # refuses what is no bundle
    return dict(json.loads((target / MANIFEST).read_text(encoding="utf-8")))


def _written(target: Path) -> Mapping[str, str | None]:
    """Files and hashes that the manifest names; of the manifest itself there is no hash."""
    path = target / MANIFEST
    try:
        described = path.lstat()
        if not stat.S_ISREG(described.st_mode) or described.st_size > MANIFEST_LIMIT:
            raise InputError(f"{MANIFEST} is not a small file")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        # Other programs have manifests too.
        if manifest["made_by"] != MADE_BY:
            raise InputError(f"{MANIFEST} is of another program")
        return {**manifest["files"], MANIFEST: None}
    # No manifest, no JSON, JSON of another shape or nested too deep: in each case these files are not ours.
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{target} contains files that depthscope did not write; choose an empty or new folder with --out"
        ) from error


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Write the manifest of a folder: the facts, and the SHA-256 of every file.

    ``folder``: A folder whose files are all written.
    ``facts``: what JSON can say; anything else as text. By ``made_by`` the next export knows that the folder is one of
    its own.
    """
    # Sorted: the order of a directory listing differs between systems, and with it the bytes of the manifest.
    names = sorted(entry.relative_to(folder) for entry in folder.rglob("*") if entry.is_file())
    listed = {name.as_posix(): sha256(folder / name) for name in names}
    path = folder / MANIFEST
    path.write_text(
        json.dumps({"made_by": MADE_BY, **facts, "files": listed}, indent=2, default=str, ensure_ascii=False)
        + "\n"
    )
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
