"""Which runs may the dashboard open? Those below the paths named at launch; each is analysed until its file changes."""

# A visitor sends names, in the sidebar and in the URL, never paths: a page has no box for a path, and a name is looked
# up in the list of what is below the paths that the command line named. No name reaches another file that way.

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from depthscope.app.readings.readings import Reading, read_runs
from depthscope.diagnostics import schema

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
    """Runs below the allowed paths, under names that differ.

    Returns
    -------
    dict of str to Path
        Name → resolved path.
    """
    found: dict[str, Path] = {}
    for root in _roots:
        for name, path in schema.list_runs(root).items():
            target = path.resolve()
            # A link that leaves its root would open any file of this machine; two roots may contain the same run.
            if target.is_relative_to(root) and target not in found.values():
                found[_distinct_name(name, target, found)] = target
    return found


def _distinct_name(name: str, path: Path, taken: dict[str, Path]) -> str:
    """The name, with as many folders before it as make it differ from those taken."""
    folders = list(path.parent.parts[1:])
    while name in taken and folders:
        name = f"{folders.pop()}/{name}"
    return name


def read_run(name: str) -> tuple[Reading, ...] | UnreadableRun:
    """A listed run, analysed and judged: one reading for each of its chains.

    Parameters
    ----------
    name : str
        A name from `list_runs`, possibly from a URL.

    Returns
    -------
    tuple of Reading or UnreadableRun
    """
    path = list_runs().get(name)
    if path is None:
        reason = "This run is not below the paths that the dashboard was started with."
        return UnreadableRun(name, Path(name), reason)
    # A zarr store is a folder of many files, of which a live run rewrites some.
    files = [entry for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else [path]
    stats = [entry.stat() for entry in files]
    modified = max((stat.st_mtime_ns for stat in stats), default=0)
    return _read(name, str(path), modified, sum(stat.st_size for stat in stats))


# cache_resource and not cache_data: cache_data copies what it returns by pickle at every rerun, and readings are
# large and never changed.
@st.cache_resource(max_entries=64, show_spinner=False)
def _read(name: str, path: str, modified: int, size: int) -> tuple[Reading, ...] | UnreadableRun:
    """Read, analyse and judge; the newest change (ns) and the size (bytes) are parameters since they key the cache."""
    try:
        run = schema.open_run(path, max_bytes=_limit["max_bytes"])
        try:
            return tuple(read_runs({name: run}))
        finally:
            run.close()
    except (schema.SchemaError, OSError) as error:
        return UnreadableRun(name, Path(path), str(error))
    except Exception as error:
        # A foreign file may fail in any way, and must not take the page of the other runs with it: the page explains
        # it, the log has the traceback.
        logging.getLogger(__name__).warning("reading %s failed", path, exc_info=True)
        return UnreadableRun(name, Path(path), f"The analysis failed. {type(error).__name__}: {error}")
