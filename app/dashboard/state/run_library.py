"""Which runs may the dashboard open? Those below the paths named at launch; each is analysed until its file changes."""

# A visitor sends names, in the sidebar and in the URL, never paths: a page has no box for a path, and a name is looked
# up in the list of what is below the paths that the command line named. No name reaches another file that way.

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from depthscope.app.dashboard.state import growing_runs
from depthscope.app.dashboard.state.run_reading import (
    CACHE_BYTES,
    LIMIT,
    Analyses,
    ReadingCache,
    UnreadableRun,
    read,
    sentence,
    version_of,
)
from depthscope.app.figures import Selection
from depthscope.app.readings.close_up import CloseUp, read_close_up
from depthscope.app.readings.depth_map import Summary, summary_of
from depthscope.app.readings.kept_readings import keep, kept_readings, kept_summaries
from depthscope.app.readings.provenance import FileVersion
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.differences import between_runs
from depthscope.app.text.visible import visible_name
from depthscope.diagnostics import schema
from depthscope.diagnostics.analysis.differences import Difference
from depthscope.diagnostics.experiments import RESULTS, result_path

BEFORE_THE_FIRST_STEP = "It is being recorded, and no step of it was measured yet."

IS_ANALYSED = "It is being analysed."

_roots: list[Path] = []
"""The paths named at launch, resolved; one list for the process, since Streamlit serves every session from it."""


_summaries: dict[Path, tuple[tuple[Any, ...], list[Summary]]] = {}
"""Read once: a table of 500 runs is drawn anew at every click. Each has some ten kilobytes."""


_beside: list[Analyses] = []
"""Where other processes analyse; empty where this one does, as in a test."""


def analyse_beside() -> None:
    """Leave analyses to other processes from now on, so that pages stay quick and analyses go on without a page."""
    _beside[:] = [Analyses()]


def stop() -> None:
    """End the analyses of other processes: the server ends."""
    for analyses in _beside:
        analyses.stop()


def ask_for(runs: Mapping[str, Path]) -> bool:
    """Have runs analysed, now or soon; whether some of their `summaries_of` are known now."""
    later = {name: path for name, path in runs.items() if _beside and not growing_runs.is_growing(path)}
    if later:
        _beside[0].ask(later)
    now = {name: path for name, path in runs.items() if name not in later}
    for name, path in now.items():
        read_run(name, {name: path})
    return bool(now)


def differences_between(readings: Sequence[Reading], metric: str, view: Selection) -> list[Difference]:
    """Every run against the first, sequence by sequence; remembered until a file changes."""
    versions = tuple((reading.name, FileVersion.of(Path(reading.path))) for reading in readings)
    return _differences.get(
        (versions, metric, view), lambda: between_runs(readings, [metric], view, max_bytes=LIMIT["max_bytes"])
    )


def waiting_words(path: Path) -> str:
    """How far a run is that has to be analysed."""
    waits = bool(_beside) and _beside[0].is_waiting(path)
    return "waiting for its analysis" if waits else "being analysed"


def allow(paths: Sequence[Path], *, max_bytes: int | None = None) -> None:
    """Fix the files and folders that this process may show."""
    LIMIT["max_bytes"] = max_bytes
    _roots[:] = [path.resolve() for path in paths]


def list_runs() -> dict[str, Path]:
    """Runs below the allowed paths: a name that differs to the eye from others → resolved path."""
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

    An analysis is saved in the user's cache, see `kept_readings`. One that other processes make is waited for by the page.

    ``name``: A name from `list_runs`, possibly from a URL.
    ``listed``: what `list_runs` returned just now: for many names the folders are walked through once.
    """
    path = (list_runs() if listed is None else listed).get(name)
    if path is None:
        reason = "This run is not below the paths that the dashboard was started with."
        return UnreadableRun(name, Path(name), reason)
    if growing_runs.is_waiting(path):
        return UnreadableRun(name, path, BEFORE_THE_FIRST_STEP, waits=True)
    if growing_runs.is_growing(path):
        return growing_runs.read_growing(name, path)
    # Twice: a file that was replaced while it was read is there as a whole the second time.
    for _ in range(2):
        try:
            version = version_of(path)
            is_known = _cache.peek((name, path, version)) is not None or kept_summaries(path, version)
            if _beside and not is_known and _beside[0].result_of(path, version) is None:
                _beside[0].ask({name: path}, first=True)
                return UnreadableRun(name, path, IS_ANALYSED, waits=True)
            found = _cache.get((name, path, version), partial(_kept_or_read, name, path, version))
            if version_of(path) == version:
                return found
        except OSError as error:  # it has gone, or is a pipe
            return UnreadableRun(name, path, sentence(error))
    reason = "This run changes while it is read. Reload this page when it is written."
    return UnreadableRun(name, path, reason)


def summaries_of(name: str, path: Path) -> list[Summary] | UnreadableRun | None:
    """What the verdicts of a run say; None where the run has to be analysed first."""
    if growing_runs.is_waiting(path):
        return UnreadableRun(name, path, BEFORE_THE_FIRST_STEP, waits=True)
    if growing_runs.is_growing(path):
        # Analysed again now and then; what its rows say at the moment is in `live_states`.
        known = growing_runs.read_growing(name, path) if growing_runs.is_known(path) else None
        return known if known is None else _summarised(known)
    # Its files are looked at when its analysis has ended: hundreds of runs have a hundred thousand files.
    if _beside and _beside[0].is_pending(path):
        return None
    try:
        place = _place_of(path)
        if path in _summaries and _summaries[path][0] == place:
            return _summaries[path][1]
        version = version_of(path)
    except OSError as error:
        return UnreadableRun(name, path, sentence(error))
    known = _cache.peek((name, path, version))
    found = kept_summaries(path, version) if known is None else _summarised(known)
    if found is None and _beside and _beside[0].result_of(path, version) is not None:
        # It cannot be read, or what was found could not be saved: then it is analysed here.
        found = _summarised(read_run(name, {name: path}))
    if isinstance(found, list):
        _summaries[path] = place, found
    return found


def _place_of(path: Path) -> tuple[Any, ...]:
    """What tells at a glance that a run was replaced: its version is that of a thousand files, of each of 500 rows."""
    others = (path / "zarr.json", *(result_path(path, what) for what in RESULTS))
    entries = [path.stat(), *(other.stat() for other in others if other.exists())]
    return tuple((entry.st_dev, entry.st_ino, entry.st_mtime_ns, entry.st_ctime_ns) for entry in entries)


def _summarised(found: tuple[Reading, ...] | UnreadableRun) -> list[Summary] | UnreadableRun:
    return found if isinstance(found, UnreadableRun) else list(map(summary_of, found))


def close_up_of(reading: Reading) -> CloseUp | None:
    """The states of a reading, from its file; None where it has no states, or its file has gone or changed."""
    path = Path(reading.path)
    try:
        # A live store has a new row every moment, and new states now and then.
        version = FileVersion.of((schema.is_live_store(path) and schema.newest_state(path)) or path)
        return _close_ups.get(
            (path, version, reading.chain),
            partial(read_close_up, path, reading.chain, max_bytes=LIMIT["max_bytes"]),
        )
    except (schema.SchemaError, OSError):
        logging.getLogger(__name__).debug("no states of %s", ascii(str(path)), exc_info=True)
        return None


def _kept_or_read(name: str, path: Path, version: FileVersion) -> tuple[Reading, ...] | UnreadableRun:
    kept = kept_readings(path, version)
    if kept is not None:
        return kept
    reason = _beside[0].result_of(path, version) if _beside else None
    if reason:
        return UnreadableRun(name, path, reason)
    found = read(name, path)
    if not isinstance(found, UnreadableRun):
        keep(path, version, found)
    return found


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


_differences = ReadingCache(32 * 2**20, lambda found: sum(each.value.nbytes * 4 for each in found) + 1000)

_close_ups = ReadingCache(CACHE_BYTES, lambda close_up: close_up.nbytes if close_up else 0)

_cache = ReadingCache(CACHE_BYTES, _size_of)
"""One for the process: all visitors share the analyses. Not Streamlit's own, which counts entries instead of bytes."""
