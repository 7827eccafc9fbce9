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
    READINGS,
    Analyses,
    Cache,
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

elsewhere = Analyses(is_on=False)
"""By other processes, once the server is started."""

_roots: list[Path] = []
"""The paths named at launch, resolved; one list for the process, since Streamlit serves every session from it."""


_summaries = Cache(10_000)
"""Made once: a table of 500 runs is drawn anew at every click. Each has some ten kilobytes."""

_differences = Cache(32 * 2**20, lambda found: sum(each.value.nbytes * 4 for each in found) + 1000)

_close_ups = Cache(CACHE_BYTES, lambda close_up: close_up.nbytes if close_up else 0)


def differences_between(readings: Sequence[Reading], metric: str, view: Selection) -> list[Difference]:
    """Every run against the first, sequence by sequence; remembered until a file changes."""
    versions = tuple((reading.name, FileVersion.of(Path(reading.path))) for reading in readings)
    found: list[Difference] = _differences.get(
        (versions, metric, view), lambda: between_runs(readings, [metric], view, max_bytes=LIMIT["max_bytes"])
    )
    return found


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
            is_known = READINGS.peek(path, (name, version)) is not None or kept_summaries(path, version)
            if elsewhere.is_on and not is_known and elsewhere.result_of(path, version) is None:
                elsewhere.ask({name: path}, first=True)
                return UnreadableRun(name, path, IS_ANALYSED, waits=True)
            found = READINGS.get(path, partial(_kept_or_read, name, path, version), (name, version))
            if version_of(path) == version:
                return found
        except OSError as error:  # it has gone, or is a pipe
            return UnreadableRun(name, path, sentence(error))
    reason = "This run changes while it is read. Reload this page when it is written."
    return UnreadableRun(name, path, reason)


def summaries_of(name: str, path: Path, *, ask: bool = False) -> list[Summary] | UnreadableRun:
    """What the verdicts of a run say, or that it has to be analysed first, which begins where one may `ask` for it."""
    words = "waiting for its analysis" if elsewhere.is_waiting(path) else "being analysed"
    waits = UnreadableRun(name, path, words, waits=True)
    if growing_runs.is_waiting(path):
        return UnreadableRun(name, path, BEFORE_THE_FIRST_STEP, waits=True)
    if growing_runs.is_growing(path):
        # Analysed again now and then; what its rows say at the moment is in `live_states`.
        is_read = ask or READINGS.peek(path) is not None
        return _summarised(growing_runs.read_growing(name, path)) if is_read else waits
    # Its files are looked at when its analysis has ended: hundreds of runs have a hundred thousand files.
    if elsewhere.is_pending(path):
        return waits
    try:
        place = _place_of(path)
        if (made := _summaries.peek(path, place)) is not None:
            return made
        version = version_of(path)
    except OSError as error:
        return UnreadableRun(name, path, sentence(error))
    known = READINGS.peek(path, (name, version))
    found = kept_summaries(path, version) if known is None else _summarised(known)
    # It cannot be read elsewhere, or what was found could not be saved: then it is analysed here.
    if found is None and (elsewhere.result_of(path, version) is not None or (ask and not elsewhere.is_on)):
        found = _summarised(read_run(name, {name: path}))
    if found is None and ask:
        elsewhere.ask({name: path})
    return _summaries.get(path, lambda: found, place) if isinstance(found, list) else found or waits


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
            (path, reading.chain),
            partial(read_close_up, path, reading.chain, max_bytes=LIMIT["max_bytes"]),
            version,
        )
    except (schema.SchemaError, OSError):
        logging.getLogger(__name__).debug("no states of %s", ascii(str(path)), exc_info=True)
        return None


def _kept_or_read(name: str, path: Path, version: FileVersion) -> tuple[Reading, ...] | UnreadableRun:
    kept = kept_readings(path, version)
    if kept is not None:
        return kept
    if reason := elsewhere.result_of(path, version):
        return UnreadableRun(name, path, reason)
    found = read(name, path)
    if not isinstance(found, UnreadableRun):
        keep(path, version, found)
    return found
