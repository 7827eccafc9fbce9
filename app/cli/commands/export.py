"""`depthscope export`: figures, tables and sources as a folder that a paper includes."""

from __future__ import annotations

import argparse
from pathlib import Path

from depthscope.app.cli.arguments import add_json, add_runs, add_selection, selection_of
from depthscope.app.cli.command import FINE, Command
from depthscope.app.text.terminal import emit, say, working


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder; files of others in it are kept")
    parser.add_argument(
        "--width", default="icml", metavar="icml|neurips|full", help="of the figures (default icml)"
    )
    parser.add_argument("--pgf", action="store_true", help="figures as PGF too (needs LaTeX)")
    add_selection(parser)
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    from depthscope.app.paper.export import VECTOR, write_bundle
    from depthscope.app.readings.readings import open_runs

    # PGF is drawn by running LaTeX, which many machines lack.
    formats = (*VECTOR, "pgf") if args.pgf else VECTOR
    with working("analysing and drawing"):
        folder = write_bundle(
            open_runs(args.runs), Path(args.out), width=args.width, view=selection_of(args), formats=formats
        )
    # as_posix: the names in the JSON are the same on every system.
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    if args.json:
        emit({"folder": str(folder), "files": files})
        return FINE
    for kind in ("figures", "tables", "data"):
        say(f"{folder / kind}: {sum(name.startswith(f'{kind}/') for name in files)} files")
    # Both ways are printed to be copied: into a paper, or compiled alone.
    say(f"In LaTeX: \\newcommand{{\\depthscopepath}}{{{folder}}} \\input{{{folder}/figures.tex}}")
    say(f"As it is: cd {folder} && latexmk -pdf main.tex")
    return FINE


COMMAND = Command("export", "write figures, tables and sources for a paper", _add_arguments, _run)
