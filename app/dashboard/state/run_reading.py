"""What does a file of the listed runs contain? Read and judged, here or by other processes; cached up to some bytes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

from depthscope.app.readings.kept_readings import keep
from depthscope.app.readings.provenance import FileVersion
from depthscope.app.readings.readings import Reading, read_runs
from depthscope.app.text.visible import LONGEST_TEXT, visible
from depthscope.diagnostics import schema
from depthscope.diagnostics.experiments import RESULTS, result_path

LIMIT: dict[str, int | None] = {"max_bytes": None}
"""Of the arrays of one run, as named at launch."""


@dataclass(frozen=True)
class UnreadableRun:
    """One run that could not be read, and why.

    ``name``: name in the list of runs.
    ``path``: its file.
    ``reason``: what came, what was expected, what to do.
    ``waits``: whether it will be readable without further ado: it is being analysed, or waits for its first step.
    """

    name: str
    path: Path
    reason: str
    waits: bool = False


def version_of(path: Path) -> FileVersion:
    """The version of a run, and of the results of experiments next to it, which are part of what is shown."""
    return FileVersion.of(path, *(result_path(path, what) for what in RESULTS))


def read(name: str, path: Path) -> tuple[Reading, ...] | UnreadableRun:
    """Read, analyse and judge a run; whatever is wrong with it is a reason, and no error."""
    try:
        run = schema.open_run(path, max_bytes=LIMIT["max_bytes"])
        try:
            return tuple(read_runs({name: run}, paths={name: path}, last_step=True))
        finally:
            run.close()
    except (schema.SchemaError, OSError) as error:
        return UnreadableRun(name, path, sentence(error))
    except Exception as error:
        # A foreign file may fail in any way, and must not take the page of the other runs with it: the page explains
        # it, the log has the traceback.
        logging.getLogger(__name__).warning("reading %s failed", ascii(str(path)), exc_info=True)
        reason = f"The analysis failed. {type(error).__name__}: {sentence(error)}"
        return UnreadableRun(name, path, reason)


def sentence(error: Exception) -> str:
    """The text of an error, with everything in it visible: names and texts of a file may be anybody's."""
    return visible(error, lines=True, longest=LONGEST_TEXT)


class Cache:
    """One value for each key, made anew for another version; bounded by size, and not by number: one run may be as large as
    a thousand others.

    Values are shared by all visitors and never changed. One value is made at a time, whoever asks: visitors who open the
    same run wait for one analysis, and the memory that analyses need is that of one.

    ``most``: size of all values together. The value used last stays also where it is larger alone, since the next click
    of a visitor needs it again.
    ``size_of``: size of a value, such as its bytes; each counts as one by default.
    """

    def __init__(self, most: int, size_of: Callable[[Any], int] = lambda _: 1):
        self._most, self._size_of, self._size = most, size_of, 0
        self._kept: OrderedDict[Hashable, tuple[Any, Any, int]] = OrderedDict()
        self._making = RLock()  # reentrant, so that making a value may ask for another one

    def get(self, key: Hashable, make: Callable[[], Any], version: Any = None) -> Any:
        """The value of a key, made where it is not cached; what making it raises is raised, and nothing is cached."""
        with self._making:
            if key not in self._kept or self._kept[key][0] != version:
                made = make()
                self.forget(key)
                self._kept[key] = version, made, self._size_of(made)
                self._size += self._kept[key][2]
            self._kept.move_to_end(key)
            while self._size > self._most and len(self._kept) > 1:
                self.forget(next(iter(self._kept)))
            return self._kept[key][1]

    def refreshed(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of a key that follows a file, with what was added to the file; let go where that cannot be read."""
        with self._making:
            try:
                value = self.get(key, make)
                value.refresh()
            except BaseException:
                self.forget(key)
                raise
            return value

    def peek(self, key: Hashable, *version: Any) -> Any:
        """The value of a key, of any version where none is named; None where it is not cached: nobody is waited for."""
        kept = self._kept.get(key)
        return None if kept is None or (version and version[0] != kept[0]) else kept[1]

    def forget(self, *keys: Hashable) -> None:
        """Let some values go, all where none is named."""
        with self._making:
            for key in keys or list(self._kept):
                self._size -= self._kept.pop(key, (None, None, 0))[2]


def _size_of(found: tuple[Reading, ...] | UnreadableRun) -> int:
    """Bytes that a result keeps in memory: its numbers, and its attributes about as they would be printed."""
    if isinstance(found, UnreadableRun):
        return len(found.reason)
    return sum(
        len(repr((reading.attrs, reading.analysis.attrs)))
        + sum(each.nbytes for each in (reading.analysis, *reading.results.values()))
        for reading in found
    )


CACHE_BYTES = 128 * 2**20
"""Memory for analysed runs: 500 runs of 12 layers. A heuristic of ours: the others are read from the user's cache folder."""

READINGS = Cache(CACHE_BYTES, _size_of)
"""Of each path the readings or why there are none. Not Streamlit's own cache, which counts entries instead of bytes."""


# --- analyses by other processes, while a visitor looks at something else

# A fork of the server would have its threads' locks; a fork of a process that has imported everything begins at once.
_context: Any = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
if _context.get_start_method() == "forkserver":
    _context.set_forkserver_preload([__name__])


@dataclass
class _Job:
    """An analysis of one version of a run; `reason` is why there is none, empty where there is, None until that is known."""

    name: str
    path: Path
    version: FileVersion
    reason: str | None = None


class Analyses:
    """Analyses of runs by other processes; one for the server.

    What they find is saved in the user's cache (`kept_readings`), from which the server reads it.

    ``most``: processes at a time; as many as there are cores by default.
    ``is_on``: whether analyses are left to other processes, so that pages stay quick; as in a test they are not.
    """

    def __init__(self, most: int | None = None, *, is_on: bool = True):
        self.is_on = is_on
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._threads = ThreadPoolExecutor(most or cores or 1)
        self._jobs: dict[Path, _Job] = {}
        self._waiting: list[_Job] = []
        self._lock = RLock()

    def ask(self, runs: Mapping[str, Path], *, first: bool = False) -> None:
        """Have runs analysed, unless these very files already were or are waiting for it.

        ``first``: before all that wait.
        """
        with self._lock:
            for name, path in runs.items():
                if self.is_pending(path) and not first:
                    continue
                with suppress(OSError):  # it has gone
                    version = version_of(path)
                    if path not in self._jobs or self._jobs[path].version != version:
                        self._jobs[path] = _Job(name, path, version)
                        self._waiting.append(self._jobs[path])
                        self._threads.submit(self._analyse_next)
                    if first and self._jobs[path] in self._waiting:
                        self._waiting.remove(self._jobs[path])
                        self._waiting.insert(0, self._jobs[path])

    def _analyse_next(self) -> None:
        with self._lock:
            job = self._waiting.pop(0)
        job.reason = _analysed(job)

    def is_pending(self, path: Path) -> bool:
        """Whether an analysis of a run was asked for and has not ended."""
        job = self._jobs.get(path)
        return job is not None and job.reason is None

    def is_waiting(self, path: Path) -> bool:
        """Whether the analysis of a run was asked for and has not begun."""
        return self._jobs.get(path) in self._waiting

    def result_of(self, path: Path, version: FileVersion) -> str | None:
        """Why a run cannot be analysed, empty where it was; None where that is not known yet."""
        job = self._jobs.get(path)
        return job.reason if job is not None and job.version == version else None

    def stop(self) -> None:
        """End all analyses: the server ends, and it is no news that they did."""
        logging.getLogger(__name__).disabled = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def _analysed(job: _Job) -> str:
    """Why a run cannot be analysed, empty where its analysis is saved."""
    try:
        # A process of its own for each run: one that is ended for its memory takes no other analysis with it.
        with ProcessPoolExecutor(1, mp_context=_context) as process:
            return process.submit(_work, job.name, job.path, job.version, LIMIT["max_bytes"]).result()
    except BrokenProcessPool:
        reason = "The process that analysed it was ended, perhaps for its memory. Analyse it by itself: depthscope analyze"
    except OSError as error:
        reason = f"No process could be started to analyse it: {error}."
    logging.getLogger(__name__).warning("%s: %s", ascii(str(job.path)), reason)
    return reason


def _work(name: str, path: Path, version: FileVersion, max_bytes: int | None) -> str:
    """In a process of its own: analyse a run and save the analysis, or return why there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server is told, and ends this
    with suppress(OSError):
        os.nice(5)  # pages before analyses
    LIMIT["max_bytes"] = max_bytes
    found = read(name, path)
    if isinstance(found, UnreadableRun):
        return found.reason
    keep(path, version, found)
    return ""
