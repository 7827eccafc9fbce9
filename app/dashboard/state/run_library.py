"""Which runs may the dashboard open, and what do they hold? Only those below the paths named at launch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from depthscope.app.readings.readings import Reading, read_runs
from depthscope.diagnostics import schema

__all__ = ["Book", "Unreadable", "allow", "listed", "locate", "read"]

_roots: list[Path] = []


@dataclass(frozen=True)
class Book:
    """One run that could be read: its chains, analysed and judged.

    Parameters
    ----------
    name : str
        Name in the list of runs.
    path : Path
        Where it lies.
    readings : tuple of Reading
        One for each chain.
    """

    name: str
    path: Path
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class Unreadable:
    """One run that could not be read, and why.

    Parameters
    ----------
    name : str
        Name in the list of runs.
    path : Path
        Where it lies.
    reason : str
        What came, what was expected, what to do.
    """

    name: str
    path: Path
    reason: str


def allow(paths: Sequence[Path]) -> None:
    """Fix the files and folders that this process may show.

    Parameters
    ----------
    paths : sequence of Path
        Runs, or folders of runs.
    """
    _roots[:] = [path.resolve() for path in paths]


def listed() -> dict[str, Path]:
    """Runs below the allowed paths, by names that differ.

    Returns
    -------
    dict of str to Path
        Name → resolved path; links that leave their root are left out.
    """
    found: dict[str, Path] = {}
    for root in _roots:
        for name, path in schema.list_runs(root).items():
            target = path.resolve()
            if not target.is_relative_to(root) or target in found.values():
                continue
            found[_free_name(name, target, found)] = target
    return found


def _free_name(name: str, path: Path, taken: dict[str, Path]) -> str:
    """The name itself, or with as many folders before it as it takes to differ from those taken."""
    folders = list(path.parent.parts[1:])
    while name in taken and folders:
        name = f"{folders.pop()}/{name}"
    return name


def locate(name: str) -> Path | None:
    """Path of a listed run.

    Parameters
    ----------
    name : str
        A name, possibly from a URL.

    Returns
    -------
    Path or None
        None for anything that is not listed.
    """
    return listed().get(name)


def read(name: str) -> Book | Unreadable:
    """A listed run, analysed and judged; kept until its file changes.

    Parameters
    ----------
    name : str
        A name from `listed`.

    Returns
    -------
    Book or Unreadable
    """
    path = locate(name)
    if path is None:
        return Unreadable(
            name, Path(name), "This run is not below the paths that the dashboard was started with."
        )
    modified, size = _version(path)
    return _read(name, str(path), modified, size)


def _version(path: Path) -> tuple[int, int]:
    """Newest modification (ns) and total size (bytes) of a file, or of all files of a store."""
    files = [entry for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else [path]
    stats = [entry.stat() for entry in files]
    return max((s.st_mtime_ns for s in stats), default=0), sum(s.st_size for s in stats)


@st.cache_resource(max_entries=64, show_spinner=False)
def _read(name: str, path: str, modified: int, size: int) -> Book | Unreadable:
    """Read, analyse and judge; the last two parameters are the version that the cache is keyed on."""
    try:
        run = schema.open_run(path)
        try:
            return Book(name, Path(path), tuple(read_runs({name: run})))
        finally:
            run.close()
    except (schema.SchemaError, OSError) as error:
        return Unreadable(name, Path(path), str(error))
    except (
        Exception
    ) as error:  # a foreign file may fail in any way: the page explains it, the log has the trace
        logging.getLogger(__name__).warning("reading %s failed", path, exc_info=True)
        return Unreadable(name, Path(path), f"The analysis failed. {type(error).__name__}: {error}")
