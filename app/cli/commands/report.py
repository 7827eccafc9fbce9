"""`depthscope report`: one HTML file with every figure and finding."""

from __future__ import annotations

import argparse
from pathlib import Path

from depthscope.app.cli.arguments import add_json, add_runs, add_selection, selection_of
from depthscope.app.cli.command import FINE, Command
from depthscope.app.text.terminal import emit, say, working


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="one HTML file that needs nothing else")
    add_selection(parser)
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    from depthscope.app.readings.readings import open_runs
    from depthscope.app.report.report import write_report

    with working("analysing and drawing"):
        path = write_report(open_runs(args.runs), Path(args.out), view=selection_of(args))
    if args.json:
        emit({"report": str(path), "bytes": path.stat().st_size})
    else:
        say(f"{path} ({path.stat().st_size / 1e6:.1f} MB, needs no other file)")
    return FINE


COMMAND = Command("report", "write one HTML file to send around", _add_arguments, _run)
