"""Do the chosen runs differ by more than chance? Tests of small runs are made here, those of large ones in other processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from depthscope.app.dashboard.state import growing_runs, run_library
from depthscope.app.dashboard.state.reading_cache import ReadingCache
from depthscope.app.dashboard.state.run_reading import LIMIT
from depthscope.app.figures import Selection
from depthscope.app.readings.file_version import FileVersion
from depthscope.app.readings.kept_differences import keep_differences, kept_differences
from depthscope.app.readings.readings import Reading
from depthscope.app.tables.differences import between_runs
from depthscope.diagnostics.analysis.differences import Difference

__all__ = ["differences_between"]

QUICK_BYTES = 4 * 2**20
"""Of the files of the runs: they are tested in about the time that another process takes to begin. A heuristic of ours."""

_tested = ReadingCache(32 * 2**20, lambda found: sum(each.value.nbytes * 4 for each in found) + 1000)


def differences_between(
    readings: Sequence[Reading],
    metric: str,
    view: Selection,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Difference]:
    """Every run against the first, sequence by sequence; what was tested is saved until a file changes.

    ``progress``: called with (metric, number done, number in all) while another process tests.
    Raises ValueError, OSError: Where they cannot be tested.
    """
    paths = list(dict.fromkeys(Path(each.path) for each in readings))
    versions = {path: FileVersion.of(path) for path in paths}
    # With the names: what is saved names which run is above which.
    question = f"{metric} {view} {[reading.name for reading in readings]}"
    key = (tuple(versions.items()), question)

    def known() -> list[Difference] | None:
        return _tested.peek(key) or kept_differences(versions, question)

    found = known()
    if found is None and not _is_quick(paths):
        choices = {name: value for name, value in asdict(view).items() if value is not None}
        request = {"runs": {each.run: each.path for each in readings}, "metric": metric, "view": choices}
        run_library.compare_beside(request, tuple(versions.items()), progress)
        found = known()
    if found is None:
        found = between_runs(readings, [metric], view, max_bytes=LIMIT["max_bytes"])
        keep_differences(versions, question, found)
    _tested.replace(key, lambda: found)
    return found


def _is_quick(paths: Sequence[Path]) -> bool:
    # What is being written has another version at every moment: nothing that another process keeps would be found.
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files) < QUICK_BYTES or any(
        map(growing_runs.is_growing, paths)
    )
