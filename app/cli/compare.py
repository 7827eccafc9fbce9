"""`depthscope compare`: do runs differ, and at which depths? Tests first, then a summary, then metrics by relative depth."""

from __future__ import annotations

import textwrap
from typing import Annotated

from depthscope.app.cli.main import FINE, FOUND
from depthscope.app.cli.options import (
    WIDTH,
    Json,
    MaxBytes,
    Metrics,
    Runs,
    Select,
    names,
    option,
    read_several,
    say_table,
    selection_of,
)
from depthscope.app.text.terminal import emit, remark, say


def compare(
    runs: Runs,
    metrics: Metrics = None,
    by: Annotated[
        str,
        option(
            "ATTRIBUTE",
            "Test groups of runs, such as the seeds of each family, and not every run against the first.",
        ),
    ] = "",
    select: Select = None,
    json: Json = False,
    max_bytes: MaxBytes = None,
) -> int:
    """Compare runs at the same relative depth."""
    from depthscope.app.tables.comparison import (
        COMPARED_METRICS,
        comparison_table,
        differences,
        summary_table,
    )
    from depthscope.app.tables.differences import (
        ONE_RUN_EACH,
        as_dict,
        between_groups,
        between_runs,
        in_words,
    )

    chosen = names(metrics) or COMPARED_METRICS
    selection = selection_of(select)
    readings, left_out = read_several(runs, max_bytes, "analysing", least=2)
    summary = summary_table(readings, selection)
    aligned = comparison_table(readings, chosen, selection)
    warnings = differences(readings, selection)
    if by:
        tested = between_groups(readings, chosen, selection, by=by)
    else:
        tested = between_runs(readings, chosen, selection, max_bytes=max_bytes)
    # On stderr, also with --json: a comparison of unlike runs is still printed, and stdout stays one document.
    for text in warnings:
        remark(text)
    if json:
        emit(
            {
                "warnings": warnings,
                "summary": summary.data.to_dict("records"),
                "aligned": aligned.data.to_dict("records"),
                "differences": [as_dict(difference) for difference in tested],
                "left_out": left_out,
            }
        )
        return FOUND if left_out else FINE
    for difference in tested:
        say(textwrap.fill(in_words(difference), WIDTH, subsequent_indent="  "))
    if tested and not by:
        say(textwrap.fill(f"{ONE_RUN_EACH}, with --by ATTRIBUTE.", WIDTH))
    if tested:
        say()
    # Transposed, one column a run: a terminal is too narrow for one row with ten facts.
    facts = summary.printed.copy()
    # The summary leaves the model out, the widest cell of one row per run; transposed it has room.
    facts.insert(1, "model", summary.data["model"])
    say_table(summary.caption, facts.set_index("run").T.rename_axis("").reset_index())
    say_table(aligned.caption, aligned.printed)
    return FOUND if left_out else FINE
