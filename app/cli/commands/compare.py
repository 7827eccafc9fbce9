"""`depthscope compare`: runs side by side, a summary first, then metrics at the same relative depth."""

from __future__ import annotations

import argparse
import textwrap

from depthscope.app.cli.arguments import (
    add_json,
    add_runs,
    add_selection,
    comma_separated,
    metric_names,
    positive_integer,
    selection_of,
)
from depthscope.app.cli.command import FINE, Command
from depthscope.app.text.terminal import emit, remark, say, show_rows, working


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument(
        "--metrics", type=comma_separated, metavar="A,B", help="metrics along depth or connections"
    )
    parser.add_argument(
        "--points", type=positive_integer, default=6, help="relative depths shown (default 6)"
    )
    add_selection(parser)
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    from depthscope.app.readings.readings import open_runs, read_runs
    from depthscope.app.tables.comparison import (
        COMPARED_METRICS,
        comparison_table,
        differences,
        summary_table,
    )

    # Names are checked first: a typing error should not wait for the analysis of every run.
    metrics = metric_names(args.metrics) or COMPARED_METRICS
    selection = selection_of(args)
    with working("analysing") as progress:
        readings = read_runs(open_runs(args.runs), progress=progress)
    summary = summary_table(readings, selection)
    aligned = comparison_table(readings, metrics, selection, points=args.points)
    warnings = differences(readings, selection)
    # On stderr, also with --json: a comparison of unlike runs is still printed, and stdout stays one document.
    for text in warnings:
        remark(text)
    if args.json:
        emit(
            {
                "warnings": warnings,
                "summary": summary.data.to_dict("records"),
                "aligned": aligned.data.to_dict("records"),
            }
        )
        return FINE
    say(textwrap.fill(summary.caption, 100))
    # Transposed, one column a run: a terminal is too narrow for one row with ten facts.
    facts = summary.printed.copy()
    # The summary leaves the model out, the widest cell of one row a run; transposed it has room.
    facts.insert(1, "model", summary.data["model"])
    facts = facts.set_index("run").T
    show_rows(
        ["", *map(str, facts.columns)],
        [[str(name), *map(str, row)] for name, row in zip(facts.index, facts.to_numpy(), strict=True)],
    )
    say()
    say(textwrap.fill(aligned.caption, 100))
    show_rows([str(column) for column in aligned.printed], aligned.printed.astype(str).to_numpy().tolist())
    return FINE


COMMAND = Command("compare", "put runs side by side at the same relative depth", _add_arguments, _run)
