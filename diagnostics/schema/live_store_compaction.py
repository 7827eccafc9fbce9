"""How do the rows of a log become files of columns? One for each stretch of rows with as many variables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

import numpy as np

from depthscope.diagnostics.schema.live_store_columns import OlderRows, columns_name, write_columns
from depthscope.diagnostics.schema.live_store_history import History


def write_rows(history: History, first_number: int, name_file: Callable[[str], None]) -> list[OlderRows]:
    """Write the rows of a log; ``name_file`` is called with each file before it is written.

    What was not measured yet in a stretch of rows takes no room in its file.
    """
    parts: list[OlderRows] = []
    start = 0
    for num_variables, stretch in groupby(history.rows.counts):
        end = start + len(list(stretch))
        number = first_number + len(parts)
        name_file(columns_name(number))
        parts.append(_write_part(history, number, start, end, num_variables))
        start = end
    return parts


def _write_part(history: History, number: int, start: int, end: int, num_variables: int) -> OlderRows:
    size, steps = end - start, np.array(history.rows.steps[start:end], "<i8")

    def columns() -> Iterator[np.ndarray]:
        yield steps
        yield np.array(history.rows.times[start:end], "<f8")
        for name in list(history.variables)[:num_variables]:
            yield history.values(name, start=history.num_older + start)[:size]

    return OlderRows(
        store=history.store,
        run=history.run,
        number=number,
        size=size,
        num_variables=num_variables,
        row_bytes=history.ends[num_variables],
        checksum=write_columns(history.store, history.run, number, size, num_variables, columns()),
        num_rows=size,
        first=int(steps[0]),
        last=int(steps[-1]),
    )
