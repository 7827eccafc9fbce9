"""`depthscope compare`: runs side by side, a summary first, then metrics at the same relative depth."""

from __future__ import annotations

import argparse
import textwrap

from depthscope.app.cli.arguments import add_json, add_metrics, add_runs, add_selection, selection_of
from depthscope.app.cli.command import Command
from depthscope.app.cli.several_runs import exit_code, read_several
from depthscope.app.cli.values import Number
from depthscope.app.text.terminal import emit, remark, say, show_rows


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    add_metrics(parser, about="metrics along depth or connections")
    parser.add_argument(
        "--points", type=Number(1, 1000), default=6, metavar="N", help="relative depths shown (default 6)"
    )
    parser.add_argument(
        "--by",
        metavar="ATTRIBUTE",
        help="test groups of runs, such as the seeds of each 'family', and not every run against the first",
    )
    add_selection(parser)
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
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

    metrics = args.metrics or COMPARED_METRICS
    selection = selection_of(args)
    readings, left_out = read_several(args, "analysing")
    summary = summary_table(readings, selection)
    aligned = comparison_table(readings, metrics, selection, points=args.points)
    warnings = differences(readings, selection)
    if args.by:
        tested = between_groups(readings, metrics, selection, by=args.by)
    else:
        tested = between_runs(readings, metrics, selection, max_bytes=args.max_bytes)
    # On stderr, also with --json: a comparison of unlike runs is still printed, and stdout stays one document.
    for text in warnings:
        remark(text)
    if args.json:
        emit(
            {
                "warnings": warnings,
                "summary": summary.data.to_dict("records"),
                "aligned": aligned.data.to_dict("records"),
                "differences": [as_dict(difference) for difference in tested],
                "left_out": left_out,
            }
        )
        return exit_code(left_out)
    for difference in tested:
        say(textwrap.fill(in_words(difference), 100, subsequent_indent="  "))
    if tested and not args.by:
        say(textwrap.fill(f"{ONE_RUN_EACH}, with --by ATTRIBUTE.", 100))
    if tested:
        say()
    say(textwrap.fill(summary.caption, 100))
    # Transposed, one column a run: a terminal is too narrow for one row with ten facts.
    facts = summary.printed.copy()
    # The summary leaves the model out, the widest cell of one row per run; transposed it has room.
    facts.insert(1, "model", summary.data["model"])
    facts = facts.set_index("run").T
    show_rows(
        ["", *map(str, facts.columns)],
        [[str(name), *map(str, row)] for name, row in zip(facts.index, facts.to_numpy(), strict=True)],
    )
    say()
    say(textwrap.fill(aligned.caption, 100))
    show_rows([str(column) for column in aligned.printed], aligned.printed.astype(str).to_numpy().tolist())
    return exit_code(left_out)


COMMAND = Command("compare", "compare runs at the same relative depth", _add_arguments, _run)
