"""What does a file of the listed runs contain? Read, analysed and judged, or the reason why that is not possible."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from depthscope.app.readings.file_version import FileVersion
from depthscope.app.readings.readings import Reading, read_runs
from depthscope.app.text.visible import LONGEST_TEXT, visible
from depthscope.diagnostics import schema
from depthscope.diagnostics.experiments import RESULTS, result_path

__all__ = ["LIMIT", "UnreadableRun", "read", "sentence", "version_of"]

LIMIT: dict[str, int | None] = {"max_bytes": None}
"""Of the arrays of one run, as named at launch."""


@dataclass(frozen=True)
class UnreadableRun:
    """One run that could not be read, and why.

    ``name``: name in the list of runs.
    ``path``: its file.
    ``reason``: what came, what was expected, what to do.
    ``waits``: whether it is a training of which no step was measured yet.
    """

    name: str
    path: Path
    reason: str
    waits: bool = False


def version_of(path: Path) -> FileVersion:
    """The version of a run, and of the results of experiments next to it, which are part of what is shown."""
    return FileVersion.of(path, *(result_path(path, what) for what in RESULTS))


def read(
    name: str, path: Path, progress: Callable[[str, int, int], None] | None
) -> tuple[Reading, ...] | UnreadableRun:
    """Read, analyse and judge a run; whatever is wrong with it is a reason, and no error.

    ``progress``: called with (metric, number done, number in all).
    """
    try:
        run = schema.open_run(path, max_bytes=LIMIT["max_bytes"])
        try:
            return tuple(read_runs({name: run}, paths={name: path}, progress=progress, last_step=True))
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
    """The text of an error, with everything in it visible.

    ``error``: of a file, whose names and texts may be anybody's.
    """
    return visible(error, lines=True, longest=LONGEST_TEXT)
