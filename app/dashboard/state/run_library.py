"""Which runs may the dashboard open? Those below the paths named at launch; each is analysed until its file changes."""

# A visitor sends names, in the sidebar and in the URL, never paths: a page has no box for a path, and a name is looked
# up in the list of what is below the paths that the command line named. No name reaches another file that way.

from __future__ import annotations

import logging
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import RLock
from weakref import WeakKeyDictionary

import xarray as xr

from depthscope.app.dashboard.state.live_status import LiveState, live_state
from depthscope.app.dashboard.state.reading_cache import ReadingCache
from depthscope.app.figures.run_colours import colour_places
from depthscope.app.readings.close_up import CloseUp, read_close_up
from depthscope.app.readings.file_version import FileVersion
from depthscope.app.readings.first_findings import FirstFindings
from depthscope.app.readings.followed_history import FollowedHistory
from depthscope.app.readings.followed_history import history_of as read_history
from depthscope.app.readings.kept_readings import Summary, keep, kept_readings, kept_summaries, summary_of
from depthscope.app.readings.mixing_history import read_mixing_history
from depthscope.app.readings.readings import Reading, read_runs
from depthscope.app.readings.training_history import TrainingHistory
from depthscope.app.text.visible import LONGEST_TEXT, visible, visible_name
from depthscope.diagnostics import schema
from depthscope.diagnostics.experiments import beside
from depthscope.diagnostics.schema import FollowedStore

__all__ = [
    "UnreadableRun",
    "allow",
    "close_up_of",
    "colours_of",
    "first_findings_of",
    "history_of",
    "is_growing",
    "list_runs",
    "live_states",
    "mixing_history_of",
    "read_again",
    "read_run",
    "summaries_of",
]

_roots: list[Path] = []
"""The paths named at launch, resolved; one list for the process, since Streamlit serves every session from it."""


_summaries: dict[Path, tuple[FileVersion, list[Summary]]] = {}
"""Read once: a table of 500 runs is drawn anew at every click. Each has some ten kilobytes."""

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


def read_run(
    name: str,
    listed: Mapping[str, Path] | None = None,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Reading, ...] | UnreadableRun:
    """A listed run, analysed and judged: one reading for each of its chains.

    An analysis is kept beside the run, see `kept_readings`.

    Parameters
    ----------
    name : str
        A name from `list_runs`, possibly from a URL.
    listed : mapping, optional
        What `list_runs` returned just now: for many names the folders are walked through once.
    progress : function, optional
        Called with (metric, number done, number in all) while the run is analysed.

    Returns
    -------
    tuple of Reading or UnreadableRun
    """
    path = (list_runs() if listed is None else listed).get(name)
    if path is None:
        reason = "This run is not below the paths that the dashboard was started with."
        return UnreadableRun(name, Path(name), reason)
    if schema.is_live_store(path) and is_growing(path):
        return _read_growing(name, path, progress)
    # Twice: a file that was replaced while it was read is there as a whole the second time.
    for _ in range(2):
        try:
            version = _version_of(path)
            found = _cache.get((name, path, version), partial(_kept_or_read, name, path, version, progress))
            if _version_of(path) == version:
                return found
        except OSError as error:  # it has gone, or is a pipe
            return UnreadableRun(name, path, _sentence(error))
    reason = "This run changes while it is read. Reload this page when it is written."
    return UnreadableRun(name, path, reason)


def summaries_of(name: str, path: Path) -> list[Summary] | UnreadableRun | None:
    """What the verdicts of a run say, where that is known without an analysis.

    Parameters
    ----------
    name, path
        Of `list_runs`.

    Returns
    -------
    list of Summary, UnreadableRun or None
        None where the run has to be analysed first.
    """
    if is_growing(path):
        # Analysed again now and then; what its rows say at the moment is in `live_states`.
        if path not in _growing:
            return None
        found_last = _read_growing(name, path, None)
        return found_last if isinstance(found_last, UnreadableRun) else list(map(summary_of, found_last))
    try:
        version = _version_of(path)
    except OSError as error:
        return UnreadableRun(name, path, _sentence(error))
    known = _cache.peek((name, path, version))
    if isinstance(known, UnreadableRun):
        return known
    if path in _summaries and _summaries[path][0] == version:
        return _summaries[path][1]
    found = kept_summaries(path, version) if known is None else [summary_of(each) for each in known]
    if found is not None:
        _summaries[path] = (version, found)
    return found


def close_up_of(reading: Reading) -> CloseUp | None:
    """The states of a reading, from its file.

    Parameters
    ----------
    reading : Reading
        Of `read_run`.

    Returns
    -------
    CloseUp or None
        None where it has no states, or its file has gone or changed.
    """
    path = Path(reading.path)
    try:
        # A live store has a new row every moment, and new states now and then.
        version = FileVersion.of((schema.is_live_store(path) and schema.newest_state(path)) or path)
        return _close_ups.get(
            (path, version, reading.chain),
            partial(read_close_up, path, reading.chain, max_bytes=_limit["max_bytes"]),
        )
    except (schema.SchemaError, OSError):
        logging.getLogger(__name__).debug("no states of %s", ascii(str(path)), exc_info=True)
        return None


def mixing_history_of(reading: Reading) -> xr.DataArray | None:
    """The mixing matrices of a reading over the steps of a training, from its file.

    Parameters
    ----------
    reading : Reading
        Of `read_run`.

    Returns
    -------
    DataArray or None
        None where none were recorded, or the file has gone.
    """
    path = Path(reading.path)
    try:
        version = FileVersion.of(path)
        found = _mixing_histories.get(
            (path, version, reading.chain),
            # In a tuple: of a run without a history that too is known.
            lambda: (read_mixing_history(path, reading.chain, max_bytes=_limit["max_bytes"]),),
        )
    except (schema.SchemaError, OSError):
        return None
    return found[0]


@dataclass
class _Growing:
    """What was read last of a run that is being written."""

    version: FileVersion
    found: tuple[Reading, ...] | UnreadableRun


_growing: dict[Path, _Growing] = {}

_rest = {"until": 0.0}
"""The time until which no growing run is analysed again."""

SHARE_OF_TIME = 0.2
"""Of the server's time that analyses of growing runs may take; in between, the last one is shown. A heuristic of ours."""


def is_growing(path: Path) -> bool:
    """Whether a process writes a live store at this moment.

    Parameters
    ----------
    path : Path
        Of a run.

    Returns
    -------
    bool
    """
    return schema.is_live_store(path) and schema.is_being_written(path)


def _read_growing(
    name: str, path: Path, progress: Callable[[str, int, int], None] | None
) -> tuple[Reading, ...] | UnreadableRun:
    """A run that is being written, as of its last steps: analysed again when there are new ones, but not all the time."""
    with _growing_lock:
        known = _growing.get(path)
        now = time.monotonic()
        if known is not None and now < _rest["until"]:
            return known.found
        try:
            version = _version_of(path)
        except OSError as error:
            return UnreadableRun(name, path, _sentence(error))
        if known is not None and known.version == version:
            return known.found
        found = _read(name, path, progress)
        _growing[path] = _Growing(version, found)
        ended = time.monotonic()
        _rest["until"] = ended + (ended - now) * (1 - SHARE_OF_TIME) / SHARE_OF_TIME
        return found


_growing_lock = RLock()


def read_again(reading: Reading) -> Reading | None:
    """A reading of a run that is being written, as of its last steps.

    Parameters
    ----------
    reading : Reading
        Of `read_run`.

    Returns
    -------
    Reading or None
        The same one where there is nothing new; None where it cannot be read any more.
    """
    path = Path(reading.path)
    name = reading.name.removesuffix(f"/{reading.chain}") if reading.chain else reading.name
    found = _read_growing(name, path, None)
    if isinstance(found, UnreadableRun):
        return None
    return next((each for each in found if each.chain == reading.chain), None)


def live_states(listed: Mapping[str, Path]) -> dict[str, LiveState]:
    """What is to be said of the runs that are or were written step by step.

    Parameters
    ----------
    listed : mapping of str to Path
        Of `list_runs`.

    Returns
    -------
    dict of str to LiveState
        By the names of those runs.
    """
    found = {}
    for name, path in listed.items():
        if not schema.is_live_store(path):
            continue
        with _growing_lock, suppress(schema.SchemaError, OSError):
            store = _stores.pop(path, None)
            if store is None:
                store = FollowedStore(path)
            else:
                store.refresh()
            _stores[path] = store
            while len(_stores) > MOST_FOLLOWED:
                _stores.pop(next(iter(_stores)))
            found[name] = live_state(store.status(), store.times)
    return found


_stores: dict[Path, FollowedStore] = {}


def history_of(reading: Reading) -> TrainingHistory | UnreadableRun:
    """What a reading measured step by step; of a live store with the rows that were added since the last call.

    Parameters
    ----------
    reading : Reading
        Of `read_run`.

    Returns
    -------
    TrainingHistory or UnreadableRun
    """
    path = Path(reading.path)
    with _growing_lock:
        try:
            if not schema.is_live_store(path):
                version = FileVersion.of(path)
                history: TrainingHistory = _histories.get(
                    (path, version, reading.chain), partial(read_history, reading)
                )
                return history
            followed = _followed.get((path, reading.chain))
            if followed is None:
                followed = _followed[path, reading.chain] = read_history(reading)
                while len(_followed) > MOST_FOLLOWED:
                    _followed.pop(next(iter(_followed)))
            elif isinstance(followed, FollowedHistory):
                followed.refresh()
            return followed
        except (schema.SchemaError, OSError) as error:
            _followed.pop((path, reading.chain), None)
            return UnreadableRun(reading.name, path, _sentence(error))


def colours_of(readings: Sequence[Reading]) -> dict[str, int]:
    """The numbers of the colours of some readings: a run keeps the colour that it was first shown in.

    Parameters
    ----------
    readings : sequence of Reading
        Those that are shown together.

    Returns
    -------
    dict of str to int
        See `colour_places`.
    """
    with _growing_lock:
        kept = {
            reading.name: _colours[reading.path, reading.chain]
            for reading in readings
            if (reading.path, reading.chain) in _colours
        }
        places = colour_places(readings, kept)
        for reading in readings:
            _colours.setdefault((reading.path, reading.chain), places[reading.name])
    return places


_colours: dict[tuple[str, str], int] = {}


def first_findings_of(history: TrainingHistory) -> FirstFindings:
    """Where findings began: one for a history, which remembers the steps that were judged.

    Parameters
    ----------
    history : TrainingHistory
        Of `history_of`.

    Returns
    -------
    FirstFindings
    """
    with _growing_lock:
        return _first_findings.setdefault(history, FirstFindings(history))


_first_findings: WeakKeyDictionary[TrainingHistory, FirstFindings] = WeakKeyDictionary()

MOST_FOLLOWED = 16
"""Live stores whose rows stay in memory. A heuristic of ours."""

_followed: dict[tuple[Path, str], TrainingHistory] = {}


def _version_of(path: Path) -> FileVersion:
    """Of the run, and of the results of experiments beside it, which are part of what is shown."""
    return FileVersion.of(path, *(beside(path, what) for what in ("ablate", "lens")))


def _kept_or_read(
    name: str, path: Path, version: FileVersion, progress: Callable[[str, int, int], None] | None
) -> tuple[Reading, ...] | UnreadableRun:
    kept = kept_readings(path, version)
    if kept is not None:
        return kept
    found = _read(name, path, progress)
    if not isinstance(found, UnreadableRun):
        keep(path, version, found)
    return found


def _read(
    name: str, path: Path, progress: Callable[[str, int, int], None] | None
) -> tuple[Reading, ...] | UnreadableRun:
    """Read, analyse and judge."""
    try:
        run = schema.open_run(path, max_bytes=_limit["max_bytes"])
        try:
            return tuple(read_runs({name: run}, paths={name: path}, progress=progress, last_step=True))
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

_histories = ReadingCache(CACHE_BYTES // 4, lambda history: history.num_bytes)

_mixing_histories = ReadingCache(
    CACHE_BYTES // 4, lambda found: found[0].nbytes if found[0] is not None else 100
)

_close_ups = ReadingCache(2 * CACHE_BYTES, lambda close_up: close_up.nbytes if close_up else 0)

_cache = ReadingCache(CACHE_BYTES, _size_of)
"""One for the process: all visitors share the analyses. Not Streamlit's own, which counts entries instead of bytes."""
