"""How do runs get analysed and tested while a visitor looks at something else? By worker processes, one per core."""

# What they find is saved in the user's cache (`kept_readings`): the server reads it from there, and never analyses itself.

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread
from typing import Any

from depthscope.app.dashboard.state.run_reading import LIMIT, version_of
from depthscope.app.readings.file_version import FileVersion

__all__ = ["Analyses"]

IDLE_SECONDS = 20.0
"""A process without work ends after these: its imports are a hundred megabytes."""


@dataclass
class _Job:
    """What is asked of another process: waiting, under way or done."""

    request: Mapping[str, Any]  # as JSON
    version: Hashable  # of the files that it is about
    progress: tuple[str, int, int] = ("starting", 0, 1)
    is_taken: bool = False
    is_done: bool = False
    reason: str = ""


class Analyses:
    """Analyses and tests of runs by other processes; one for the server.

    ``most``: processes at a time; as many as there are cores by default.
    """

    def __init__(self, most: int | None = None):
        self._most = most or num_cores()
        self._jobs: dict[Hashable, _Job] = {}
        self._changed = Condition()
        self._num_threads = 0

    def ask(self, runs: Mapping[str, Path], *, first: bool = False) -> None:
        """Have runs analysed, unless these very files already were.

        ``first``: before all others, since somebody waits for them.
        """
        wanted: dict[Hashable, _Job] = {}
        for name, path in runs.items():
            with suppress(OSError):  # it has gone
                wanted[path] = _Job({"name": name, "path": str(path)}, version_of(path))
        self._add(wanted, first=first)

    def _add(self, wanted: Mapping[Hashable, _Job], *, first: bool) -> None:
        with self._changed:
            for key, job in wanted.items():
                known = self._jobs.get(key)
                if known is None or known.version != job.version:
                    self._jobs[key] = job
                if first:
                    self._jobs = {key: self._jobs.pop(key), **self._jobs}
            left = sum(not job.is_taken for job in self._jobs.values())
            for _ in range(min(self._most, left) - self._num_threads):
                self._num_threads += 1
                # Daemon: the server must not wait for the end of an analysis.
                Thread(target=self._serve, daemon=True).start()
            self._changed.notify_all()

    def progress_of(self, path: Path) -> str | None:
        """How far the analysis of a run is; None where it was not begun."""
        job = self._jobs.get(path)
        if job is None or not job.is_taken:
            return None
        metric, done, total = job.progress
        return f"{metric} ({done} of {total})" if done else metric

    def result_of(self, path: Path, version: FileVersion) -> str | None:
        """Why a run cannot be analysed, empty where it was; None where that is not known yet."""
        job = self._jobs.get(path)
        return job.reason if job is not None and job.version == version and job.is_done else None

    def wait_for(self, name: str, path: Path, progress: Callable[[str, int, int], None] | None) -> None:
        """Have one run analysed before all others, and wait for it."""
        self.ask({name: path}, first=True)
        self._wait_for(path, progress)

    def wait_for_test(
        self,
        request: Mapping[str, Any],
        version: Hashable,
        progress: Callable[[str, int, int], None] | None,
    ) -> str:
        """Have the differences of runs tested before all others, and wait for it.

        ``request``: ``runs``, ``metric`` and ``view``.
        ``version``: of the files of the runs: with another one they are tested again.
        Returns: Why they cannot be tested; empty where they were.
        """
        key = json.dumps(request)
        self._add({key: _Job(request, version)}, first=True)
        self._wait_for(key, progress)
        return self._jobs[key].reason

    def _wait_for(self, key: Hashable, progress: Callable[[str, int, int], None] | None) -> None:
        with self._changed:
            while (job := self._jobs.get(key)) is not None and not job.is_done:
                if progress is not None:
                    progress(*job.progress)
                self._changed.wait(0.3)

    def _serve(self) -> None:
        process: subprocess.Popen[str] | None = None
        while (job := self._next()) is not None:
            reason = ""
            try:
                if process is not None and process.poll() is not None:
                    _end(process)
                    process = None
                process = process or _process()
                for answer in _answers(process, job.request):
                    with self._changed:
                        job.progress = tuple(answer.get("progress", job.progress))
                        reason = answer.get("reason", reason)
                        self._changed.notify_all()
            except (OSError, ValueError) as error:  # it cannot be started, or has died
                reason = _lost(process, error)
                process = None
                logging.getLogger(__name__).warning("%s: %s", ascii(job.request), reason)
            with self._changed:
                job.reason, job.is_done = reason, True
                self._changed.notify_all()
        _end(process)

    def _next(self) -> _Job | None:
        end = time.monotonic() + IDLE_SECONDS
        with self._changed:
            while (left := end - time.monotonic()) > 0:
                for job in self._jobs.values():
                    if not job.is_taken:
                        job.is_taken = True
                        return job
                self._changed.wait(left)
            # Under the lock: whoever asks now starts another thread.
            self._num_threads -= 1
        return None


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _process() -> subprocess.Popen[str]:
    code = "from depthscope.app.dashboard.state.worker import work; work()"
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(LIMIT["max_bytes"])],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _end(process: subprocess.Popen[str] | None) -> None:
    """It ends when it reads the end of its requests."""
    if process is not None:
        with suppress(BrokenPipeError):  # it has ended
            process.communicate()


def _answers(process: subprocess.Popen[str], request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the process reports of one request, until it is done.

    Raises OSError, ValueError: Where it dies before that.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    for line in process.stdout:
        answer = json.loads(line)
        yield answer
        if "reason" in answer:
            return
    raise ChildProcessError("it ended before it answered")


def _lost(process: subprocess.Popen[str] | None, error: Exception) -> str:
    """Why no answer came; the process is gone afterwards."""
    if process is None:
        return f"No process could be started to analyse it: {error}."
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)
    code = process.poll()
    process.kill()
    process.communicate()
    if code is None:
        how = f"gave an answer that cannot be read ({error})"
    elif code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
        how += ", perhaps for its memory" if -code == signal.SIGKILL else ""
    else:
        how = f"ended with exit status {code}"
    return f"The process that analysed it {how}. Analyse it by itself: depthscope analyze"
