"""What does a worker process do? It analyses and tests the runs that it is asked for, and keeps what it finds."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from depthscope.app.dashboard.state.run_differences import differences_between
from depthscope.app.dashboard.state.run_library import read_run
from depthscope.app.dashboard.state.run_reading import LIMIT, UnreadableRun, read, sentence, version_of
from depthscope.app.figures import Selection
from depthscope.app.readings.kept_first_findings import keep_first_findings
from depthscope.app.readings.kept_readings import keep
from depthscope.app.readings.readings import Reading

__all__ = ["work"]


def work() -> None:
    """Do what is asked on stdin, one request a line, and say on stdout how far each is."""
    with suppress(OSError):
        os.nice(5)  # pages before analyses
    LIMIT["max_bytes"] = json.loads(sys.argv[1])
    # Libraries may print; what is read at the other end is answers alone.
    answers, sys.stdout = sys.stdout, sys.stderr

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    def progress(*done: Any) -> None:
        say(progress=done)

    for line in sys.stdin:
        request = json.loads(line)
        try:
            say(reason=_test(request) if "metric" in request else _analyse(request, progress))
        except (OSError, ValueError) as error:  # it has gone, or cannot be tested
            say(reason=sentence(error))
        except (
            Exception
        ) as error:  # a foreign file may fail in any way, and the next one is none of its business
            say(reason=f"The analysis failed. {type(error).__name__}: {sentence(error)}")


def _analyse(request: Mapping[str, Any], progress: Callable[[str, int, int], None]) -> str:
    """Why a run cannot be analysed; empty where its analysis is saved."""
    path = Path(request["path"])
    version = version_of(path)
    found = read(request["name"], path, progress)
    if isinstance(found, UnreadableRun):
        return found.reason
    keep(path, version, found)
    with suppress(OSError, ValueError):  # the page of the training then judges its steps itself
        keep_first_findings(path, version, found)
    return ""


def _test(request: Mapping[str, Any]) -> str:
    """Why runs cannot be tested; empty where the tests are saved."""
    readings: list[Reading] = []
    for name, path in request["runs"].items():
        found = read_run(name, {name: Path(path)})
        if isinstance(found, UnreadableRun):
            return found.reason
        readings += found
    differences_between(readings, request["metric"], Selection(**request["view"]))
    return ""
