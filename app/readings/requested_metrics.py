"""What do metrics say that are computed only when they are named? Readings of a run that have them too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from depthscope.app.readings.readings import Reading, by_chain, judged
from depthscope.app.readings.stored_metrics import renewed
from depthscope.diagnostics import analyze, schema


def with_requested(
    readings: Sequence[Reading],
    metrics: Sequence[str],
    *,
    path: Path,
    max_bytes: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Reading, ...]:
    """Readings of a run with further metrics, judged again.

    ``max_bytes``: of the arrays of the run; see `schema.open_run`.
    ``progress``: called with (metric, number done, number in all).
    Returns: What a metric lacks is a reason in ``not_computed``.
    Raises ValueError: For an unknown metric, or where the analysis is of other states than the run has now.
    """
    run = schema.open_run(path, max_bytes=max_bytes)
    try:
        fresh = by_chain(analyze(run, metrics=list(metrics), progress=progress))
        return tuple(
            judged(
                reading.name,
                reading.attrs,
                renewed(fresh[reading.chain].load(), reading.analysis, complete=False),
                chain=reading.chain,
                path=reading.path,
                results=reading.results,
                is_alone=len(readings) == 1,
                num_steps=reading.num_steps,
            )
            for reading in readings
        )
    finally:
        run.close()
