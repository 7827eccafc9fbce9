"""How do runs get analysed while a visitor looks at something else? Each in a process of its own, one per core at a time."""

# What they find is saved in the user's cache (`kept_readings`): the server reads it from there, and never analyses itself.

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import RLock
from typing import Any

from depthscope.app.dashboard.state.run_reading import LIMIT, UnreadableRun, read, sentence, version_of
from depthscope.app.readings.kept_readings import keep
from depthscope.app.readings.provenance import FileVersion

__all__ = ["Analyses"]

# A fork of the server would have its threads' locks; a fork of a process that has imported everything begins at once.
_context: Any = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
if _context.get_start_method() == "forkserver":
    _context.set_forkserver_preload([__name__])


@dataclass
class _Job:
    """An analysis of one version of a run."""

    version: FileVersion
    future: Future[str]  # why it cannot be analysed, empty where it was
    progress: tuple[str, int, int] | None = None  # None before it begins


class Analyses:
    """Analyses of runs by other processes; one for the server.

    ``most``: processes at a time; as many as there are cores by default.
    """

    def __init__(self, most: int | None = None):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._threads = ThreadPoolExecutor(most or cores or 1)
        self._jobs: dict[Path, _Job] = {}
        self._lock = RLock()

    def ask(self, runs: Mapping[str, Path]) -> None:
        """Have runs analysed, unless these very files already were or are waiting for it."""
        with self._lock:
            for name, path in runs.items():
                with suppress(OSError):  # it has gone
                    version = version_of(path)
                    if path not in self._jobs or self._jobs[path].version != version:
                        job = self._jobs[path] = _Job(version, Future())
                        job.future = self._threads.submit(_analysed, job, name, path)

    def progress_of(self, path: Path) -> str | None:
        """How far the analysis of a run is; None where it was not begun."""
        job = self._jobs.get(path)
        if job is None or job.progress is None:
            return None
        metric, done, total = job.progress
        return f"{metric} ({done} of {total})" if done else metric

    def result_of(self, path: Path, version: FileVersion) -> str | None:
        """Why a run cannot be analysed, empty where it was; None where that is not known yet."""
        job = self._jobs.get(path)
        return job.future.result() if job and job.version == version and job.future.done() else None

    def wait_for(self, name: str, path: Path, progress: Callable[[str, int, int], None] | None) -> None:
        """Have one run analysed before all others, and wait for it."""
        self.ask({name: path})
        with self._lock:
            job = self._jobs.get(path)
            if job is not None and job.future.cancel():  # it was waiting: it is analysed now
                job.future = Future()
            else:
                name = ""
        if job is not None and name:
            job.future.set_result(_analysed(job, name, path, progress))
        while job is not None and not job.future.done():
            if progress is not None and job.progress is not None:
                progress(*job.progress)
            with suppress(TimeoutError, CancelledError):
                job.future.result(timeout=0.3)

    def stop(self) -> None:
        """End all analyses: the server ends."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def _analysed(
    job: _Job, name: str, path: Path, progress: Callable[[str, int, int], None] | None = None
) -> str:
    """Why a run cannot be analysed, empty where its analysis is saved."""
    job.progress = ("starting", 0, 1)
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(
        target=_work, args=(sender, name, path, job.version, LIMIT["max_bytes"]), daemon=True
    )
    try:
        process.start()
        sender.close()  # the process has it: its end is seen at the other end
        while not isinstance(answer := receiver.recv(), str):
            job.progress = answer
            if progress is not None:
                progress(*answer)
    except OSError as error:
        answer = f"No process could be started to analyse it: {error}."
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        how += ", perhaps for its memory" if -code == signal.SIGKILL else ""
        answer = f"The process that analysed it {how}. Analyse it by itself: depthscope analyze"
        logging.getLogger(__name__).warning("%s: %s", ascii(str(path)), answer)
    finally:
        receiver.close()
    return answer


def _work(answers: Connection, name: str, path: Path, version: FileVersion, max_bytes: int | None) -> None:
    """In a process of its own: analyse a run, save the analysis, and tell how far it is and at last why there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server is told, and ends this
    with suppress(OSError):
        os.nice(5)  # pages before analyses
    LIMIT["max_bytes"] = max_bytes
    try:
        found = read(name, path, lambda *done: answers.send(done))
        if not isinstance(found, UnreadableRun):
            keep(path, version, found)
        answers.send(found.reason if isinstance(found, UnreadableRun) else "")
    except Exception as error:  # a foreign file may fail in any way
        answers.send(f"{type(error).__name__}: {sentence(error)}")
