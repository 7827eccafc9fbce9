"""What does a file of the listed runs contain? Read and judged, or why not; kept in memory up to some bytes."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

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


CACHE_BYTES = 512 * 2**20
"""Memory for analysed runs: 2 000 runs of 12 layers, or a few of 1 000. A heuristic of ours: it is left to the models."""


class ReadingCache:
    """Values by key, bounded by their bytes and not by their number: one run may be as large as a thousand others.

    Values are shared by all visitors and never changed. One value is made at a time, whoever asks: visitors who open the
    same run wait for one analysis, and the memory that analyses need is that of one.

    ``most_bytes``: bytes of all values together. The value used last stays also where it is larger alone, since the
    next click of a visitor needs it again.
    ``size_of``: bytes of a value.
    """

    def __init__(self, most_bytes: int, size_of: Callable[[Any], int]):
        self._most_bytes, self._size_of = most_bytes, size_of
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._making = RLock()  # reentrant, so that making a value may ask for another one

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of a key, made where it is not cached.

        ``make``: makes it; what it raises is raised, and nothing is cached.
        """
        with self._making:
            if key not in self._kept:
                made = make()
                self._kept[key] = made, self._size_of(made)
            self._kept.move_to_end(key)
            while sum(size for _, size in self._kept.values()) > self._most_bytes and len(self._kept) > 1:
                self._kept.popitem(last=False)
            return self._kept[key][0]

    def peek(self, key: Hashable) -> Any:
        """The value of a key, None where it is not cached; nothing is made, and nobody waited for."""
        return self._kept.get(key, (None,))[0]

    def clear(self) -> None:
        """Keep nothing."""
        with self._making:
            self._kept.clear()
