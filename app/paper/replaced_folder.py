"""How is a folder of results replaced without losing what others put there? By its manifest, in one move."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A fresh folder that takes the target's place when the block ends without an error.

    Files in the target that an earlier run did not write move along, unchanged.

    Parameters
    ----------
    target : Path
        Missing, empty, or a bundle of an earlier run.

    Yields
    ------
    Path
        Where to write.

    Raises
    ------
    ValueError
        For a folder of somebody else, or a bundle whose files were edited.
    """
    foreign = foreign_files(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: a rename within one file system is atomic, and the old folder can be moved back.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as place:
        fresh = Path(place) / "fresh"
        fresh.mkdir()
        # Where the block raises, nothing below runs and the temporary folder goes with all that was written.
        yield fresh
        refuse_taken(fresh, foreign, target)
        _swap(fresh, target, Path(place) / "old", foreign)


def foreign_files(target: Path) -> list[Path]:
    """Files in a folder that its manifest does not name; relative paths.

    Parameters
    ----------
    target : Path
        A folder, perhaps missing.

    Returns
    -------
    list of Path

    Raises
    ------
    ValueError
        For a file, a folder of somebody else, or one with files of ours that were edited.
    """
    if not target.exists():
        return []
    if not target.is_dir():
        raise ValueError(f"{target} is a file; name a folder to write to")
    # A link to a folder counts as a file of somebody else: it moves along, what it points to stays where it is.
    present = sorted(
        entry.relative_to(target) for entry in target.rglob("*") if not entry.is_dir() or entry.is_symlink()
    )
    # An empty folder belongs to nobody.
    if not present:
        return []
    written = _written(target)
    # Edited by hand is work that an export would destroy.
    edited = [
        name for name in present if str(name) in written and sha256(target / name) != written[str(name)]
    ]
    if edited:
        raise ValueError(
            f"{target / edited[0]} was edited after depthscope wrote it; "
            "rename it, or choose another folder with --out"
        )
    return [name for name in present if str(name) not in written and str(name) != MANIFEST]


def _written(target: Path) -> Mapping[str, str]:
    """Files and hashes that the manifest names."""
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        return dict(manifest["files"])
    # No manifest, no JSON, or a manifest of another program: in each case these files are not ours.
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{target} contains files that depthscope did not write; choose an empty or new folder with --out"
        ) from error


def refuse_taken(fresh: Path, foreign: list[Path], target: Path) -> None:
    """Refuse to write over a file of somebody else.

    Parameters
    ----------
    fresh : Path
        The folder that was written.
    foreign : list of Path
        Relative paths of files that move along.
    target : Path
        For the message.

    Raises
    ------
    ValueError
        Where a fresh file has the name of a foreign one.
    """
    for name in foreign:
        # Refused before the swap, so that the folder is as it was.
        if (fresh / name).exists():
            raise ValueError(f"{target / name} was not written by depthscope and is in the way; rename it")


def _swap(fresh: Path, target: Path, aside: Path, foreign: list[Path]) -> None:
    """Move the target aside, the fresh folder in its place, and the files of others back into it."""
    if target.exists():
        target.rename(aside)
    try:
        fresh.rename(target)
    except OSError:
        # The old folder comes back, so that a failed export leaves what was there.
        if aside.exists():
            aside.rename(target)
        raise
    for name in foreign:
        # The folder of the foreign file may be one that this export did not write to.
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).rename(target / name)


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Write the manifest of a folder: the facts, and the SHA-256 of every file.

    Parameters
    ----------
    folder : Path
        A folder whose files are all written.
    facts : mapping
        What JSON can say; anything else as text.

    Returns
    -------
    Path
    """
    # Sorted: the order of a directory listing differs between systems, and with it the bytes of the manifest.
    names = sorted(entry.relative_to(folder) for entry in folder.rglob("*") if entry.is_file())
    listed = {name.as_posix(): sha256(folder / name) for name in names}
    path = folder / MANIFEST
    path.write_text(json.dumps({**facts, "files": listed}, indent=2, default=str, ensure_ascii=False) + "\n")
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Parameters
    ----------
    path : Path
        A file.

    Returns
    -------
    str
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()
