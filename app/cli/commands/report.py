"""`depthscope report`: one HTML file with every figure and finding."""

from __future__ import annotations

import argparse
from pathlib import Path

from depthscope.app.cli.arguments import add_json, add_out, add_runs, add_selection, selection_of
from depthscope.app.cli.command import Command
from depthscope.app.cli.paths import OutputFile
from depthscope.app.cli.several_runs import exit_code, read_several
from depthscope.app.text.terminal import emit, say, working


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    page = OutputFile("HTML file", lambda: (".html", ".htm"), "report.html")
    add_out(parser, page, metavar="FILE", about="one HTML file that needs nothing else")
    parser.add_argument(
        "--interactive",
        action="store_true",
        help="figures with zoom and with numbers under the mouse (a file of some 10 MB)",
    )
    add_selection(parser)
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    from depthscope.app.report.report import write_report

    readings, left_out = read_several(args, "analysing")
    with working("drawing"):
        path = write_report(
            readings, Path(args.out), force=args.force, view=selection_of(args), interactive=args.interactive
        )
    if args.json:
        emit({"report": str(path), "bytes": path.stat().st_size, "left_out": left_out})
    else:
        say(f"{path} ({path.stat().st_size / 1e6:.1f} MB, needs no other file)")
    return exit_code(left_out)


COMMAND = Command("report", "write one HTML file that can be sent to others", _add_arguments, _run)
