"""How do runs get analysed while a visitor looks at something else? By worker processes, one per core."""

# What they find is saved in the user's cache (`kept_readings`): the server reads it from there, and never analyses itself.

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread
from typing import Any

from depthscope.app.dashboard.state.run_reading import LIMIT, UnreadableRun, read, sentence, version_of
from depthscope.app.readings.first_findings import keep_first_findings
from depthscope.app.readings.kept_readings import keep
from depthscope.app.readings.provenance import FileVersion

__all__ = ["Analyses", "work"]

IDLE_SECONDS = 20.0
"""A process without work ends after these: its imports are a hundred megabytes."""


@dataclass
class _Job:
    """An analysis: waiting, under way or done."""

    name: str
    path: Path
    version: FileVersion
    progress: tuple[str, int, int] = ("starting", 0, 1)
    is_taken: bool = False
    is_done: bool = False
    reason: str = ""


class Analyses:
    """Analyses of runs by other processes; one for the server.

    ``most``: processes at a time; as many as there are cores by default.
    """

    def __init__(self, most: int | None = None):
        self._most = most or num_cores()
        self._jobs: dict[Path, _Job] = {}
        self._changed = Condition()
        self._num_threads = 0

    def ask(self, runs: Mapping[str, Path], *, first: bool = False) -> None:
        """Have runs analysed, unless these very files already were.

        ``first``: before all others, since somebody waits for them.
        """
        with self._changed:
            for name, path in runs.items():
                with suppress(OSError):  # it has gone
                    version = version_of(path)
                    if path not in self._jobs or self._jobs[path].version != version:
                        self._jobs[path] = _Job(name, path, version)
                    if first:
                        self._jobs = {path: self._jobs.pop(path), **self._jobs}
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
        with self._changed:
            while (job := self._jobs.get(path)) is not None and not job.is_done:
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
                for answer in _answers(process, {"name": job.name, "path": str(job.path)}):
                    with self._changed:
                        job.progress = tuple(answer.get("progress", job.progress))
                        reason = answer.get("reason", reason)
                        self._changed.notify_all()
            except (OSError, ValueError) as error:  # it cannot be started, or has died
                reason = _lost(process, error)
                process = None
                logging.getLogger(__name__).warning("%s: %s", ascii(str(job.path)), reason)
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
    return subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import work; work()", json.dumps(LIMIT["max_bytes"])],
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


def work() -> None:
    """In a worker process: analyse the runs named on stdin, one a line, and report on stdout how far each is."""
    with suppress(OSError):
        os.nice(5)  # pages before analyses
    LIMIT["max_bytes"] = json.loads(sys.argv[1])
    # Libraries may print; what is read at the other end is answers alone.
    answers, sys.stdout = sys.stdout, sys.stderr

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    for line in sys.stdin:
        request = json.loads(line)
        try:
            say(reason=_analyse(request["name"], Path(request["path"]), lambda *done: say(progress=done)))
        except (
            Exception
        ) as error:  # a foreign file may fail in any way, and the next one is none of its business
            kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
            say(reason=f"{kind}{sentence(error)}")


def _analyse(name: str, path: Path, progress: Callable[[str, int, int], None]) -> str:
    """Why a run cannot be analysed; empty where its analysis is saved."""
    version = version_of(path)
    found = read(name, path, progress)
    if isinstance(found, UnreadableRun):
        return found.reason
    keep(path, version, found)
    with suppress(OSError, ValueError):  # the page of the training then judges its steps itself
        keep_first_findings(path, version, found)
    return ""
