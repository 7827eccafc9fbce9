"""Which runs may the dashboard open? Those below the paths named at launch; each is analysed until its file changes."""

# A visitor sends names, in the sidebar and in the URL, never paths: a page has no box for a path, and a name is looked
# up in the list of what is below the paths that the command line named. No name reaches another file that way.

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from depthscope.app.dashboard.state.file_version import FileVersion
from depthscope.app.dashboard.state.reading_cache import ReadingCache
from depthscope.app.readings.readings import Reading, read_runs
from depthscope.app.text.visible import LONGEST_TEXT, visible, visible_name
from depthscope.diagnostics import schema
from depthscope.diagnostics.experiments import beside

__all__ = ["UnreadableRun", "allow", "list_runs", "read_run"]

_roots: list[Path] = []
"""The paths named at launch, resolved; one list for the process, since Streamlit serves every session from it."""


_limit: dict[str, int | None] = {"max_bytes": None}
"""Of the arrays of one run, as named at launch."""


@dataclass(frozen=True)
class UnreadableRun:
    """One run that could not be read, and why.

    Parameters
    ----------
    name : str
        Name in the list of runs.
    path : Path
        Its file.
    reason : str
        What came, what was expected, what to do.
    """

    name: str
    path: Path
    reason: str


def allow(paths: Sequence[Path], *, max_bytes: int | None = None) -> None:
    """Fix the files and folders that this process may show.

    Parameters
    ----------
    paths : sequence of Path
        Runs, or folders of runs.
    max_bytes : int, optional
        Of the arrays of one run; see `schema.open_run`.
    """
    _limit["max_bytes"] = max_bytes
    _roots[:] = [path.resolve() for path in paths]


def list_runs() -> dict[str, Path]:
    """Runs below the allowed paths, under names that differ to the eye.

    Returns
    -------
    dict of str to Path
        Name, in which everything can be seen → resolved path.
    """
    found: dict[str, Path] = {}
    # The same run by two roots is listed once; a set, since a folder may contain thousands.
    listed: set[Path] = set()
    for root in _roots:
        for name, path in schema.list_runs(root).items():
            target = path.resolve()
            # A link that leaves its root would open any file of this machine; two roots may contain the same run.
            if target.is_relative_to(root) and target not in listed:
                listed.add(target)
                found[_distinct_name(name, target, found)] = target
    return found


def _distinct_name(name: str, path: Path, taken: dict[str, Path]) -> str:
    """The name, with as many folders before it as make it differ from those taken, or spelled in ASCII."""
    # Composed: a letter with its accent and a letter followed by an accent look the same, and are two names.
    shown = unicodedata.normalize("NFC", visible_name(name))
    if shown not in taken:
        return shown
    if unicodedata.normalize("NFC", name) != name:
        shown = name.encode("ascii", "backslashreplace").decode()
    folders = list(path.parent.parts[1:])
    while shown in taken and folders:
        shown = f"{visible_name(folders.pop())}/{shown}"
    return shown


def read_run(name: str, listed: Mapping[str, Path] | None = None) -> tuple[Reading, ...] | UnreadableRun:
    """A listed run, analysed and judged: one reading for each of its chains.

    Parameters
    ----------
    name : str
        A name from `list_runs`, possibly from a URL.
    listed : mapping, optional
        What `list_runs` returned just now: for many names the folders are walked through once.

    Returns
    -------
    tuple of Reading or UnreadableRun
    """
    path = (list_runs() if listed is None else listed).get(name)
    if path is None:
        reason = "This run is not below the paths that the dashboard was started with."
        return UnreadableRun(name, Path(name), reason)
    # Twice: a file that was replaced while it was read is there as a whole the second time.
    for _ in range(2):
        try:
            version = _versions(path)
            found = _cache.get((name, path, version), lambda: _read(name, path))
            if _versions(path) == version:
                return found
        except OSError as error:  # it has gone, or is a pipe
            return UnreadableRun(name, path, _sentence(error))
    reason = "This run changes while it is read. Reload this page when it is written."
    return UnreadableRun(name, path, reason)


def _versions(path: Path) -> tuple[FileVersion, ...]:
    """Of the run, and of the results of experiments beside it, which are part of what is shown."""
    found = [FileVersion.of(path)]
    for what in ("ablate", "lens"):
        # None there, or something that is no file: then it is not read either.
        with suppress(OSError):
            found.append(FileVersion.of(beside(path, what)))
    return tuple(found)


def _read(name: str, path: Path) -> tuple[Reading, ...] | UnreadableRun:
    """Read, analyse and judge."""
    try:
        run = schema.open_run(path, max_bytes=_limit["max_bytes"])
        try:
            return tuple(read_runs({name: run}, paths={name: path}))
        finally:
            run.close()
    except (schema.SchemaError, OSError) as error:
        return UnreadableRun(name, path, _sentence(error))
    except Exception as error:
        # A foreign file may fail in any way, and must not take the page of the other runs with it: the page explains
        # it, the log has the traceback.
        logging.getLogger(__name__).warning("reading %s failed", ascii(str(path)), exc_info=True)
        reason = f"The analysis failed. {type(error).__name__}: {_sentence(error)}"
        return UnreadableRun(name, path, reason)


def _sentence(error: Exception) -> str:
    return visible(error, lines=True, longest=LONGEST_TEXT)


def _size_of(found: tuple[Reading, ...] | UnreadableRun) -> int:
    """Bytes that a result keeps in memory: its numbers, and its attributes about as they would be printed."""
    if isinstance(found, UnreadableRun):
        return len(found.reason)
    return sum(
        reading.analysis.nbytes
        + len(repr(reading.attrs))
        + len(repr(reading.analysis.attrs))
        + sum(result.nbytes for result in reading.results.values())
        for reading in found
    )


CACHE_BYTES = 512 * 2**20
"""Memory for analysed runs: 2 000 runs of 12 layers, or a few of 1 000. A heuristic of ours: it is left to the models."""

_cache = ReadingCache(CACHE_BYTES, _size_of)
"""One for the process: all visitors share the analyses. Not Streamlit's own, which counts entries instead of bytes."""
