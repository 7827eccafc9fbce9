"""Which runs are in a folder? Saved runs by their path without the ending."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.schema.formats import SUFFIXES, without_suffix
from depthscope.diagnostics.schema.live_store_files import is_live_store

# A run in a zarr folder counts as one. A heuristic of ours: some seconds of reading.
MAX_ENTRIES = 200_000


def list_runs(root: str | os.PathLike[str]) -> dict[str, Path]:
    """Saved runs below a folder, by their path without the ending; the path of a run gives that run.

    ``root``: a folder, or one run.
    Returns: In alphabetical order; links that leave the root are left out.
    Raises InputError: For a folder of more than `MAX_ENTRIES` files.
    """
    # Resolved, so that a root that is reached by a link is not itself taken for a place outside.
    base = Path(root).resolve()
    if is_live_store(base):
        return {base.name: base}
    if base.name.endswith(SUFFIXES):
        return {without_suffix(base.name): base} if base.exists() else {}
    found: dict[str, Path] = {}
    for entry in sorted(_walk(base, itertools.count(1))):
        # A dashboard may serve this folder to others: nothing outside it is offered.
        if _is_below(base, entry):
            found[without_suffix(str(entry.relative_to(base)))] = entry
    return found


def _is_below(base: Path, entry: Path) -> bool:
    try:
        return entry.resolve().is_relative_to(base)
    except (OSError, RuntimeError):  # a link that leads in a circle
        return False


def _walk(folder: Path, seen: Iterator[int]) -> Iterable[Path]:
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        # The root of a disk would be read for minutes.
        if next(seen) > MAX_ENTRIES:
            raise InputError(
                f"more than {MAX_ENTRIES} files up to {folder}; name the folder that the runs are in"
            )
        # A name with a dot is a run that is being written, see `save_run`.
        if entry.name.startswith("."):
            continue
        if entry.name.endswith(SUFFIXES) or is_live_store(entry):
            yield entry
        elif entry.is_dir() and not entry.is_symlink():  # a linked folder may lead in a circle
            yield from _walk(entry, seen)
