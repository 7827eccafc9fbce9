"""`depthscope export`: figures, tables and sources as a folder that a paper includes."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from depthscope.app.cli.arguments import add_json, add_out_folder, add_runs, add_selection, selection_of
from depthscope.app.cli.command import Command
from depthscope.app.cli.several_runs import exit_code, read_several
from depthscope.app.cli.values import OneOf
from depthscope.app.text.terminal import emit, say, working


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    add_out_folder(parser, about="output folder: a new one, or an empty one")
    parser.add_argument(
        "--venue",
        type=OneOf(_venues),
        default="icml",
        metavar="icml|neurips|iclr|acl|cvpr|ieee|plain",
        help="venue whose page layout the figures and tables are made for (default icml)",
    )
    parser.add_argument(
        "--by",
        metavar="ATTRIBUTE",
        help="group runs by it, such as family: means with bands over seeds",
    )
    parser.add_argument("--pgf", action="store_true", help="figures as PGF too (needs LaTeX)")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace a folder that an earlier export wrote",
    )
    add_selection(parser)
    add_json(parser)


def _venues() -> list[str]:
    from depthscope.app.text.venues import VENUES

    return list(VENUES)


def _run(args: argparse.Namespace) -> int:
    from depthscope.app.paper.export import VECTOR, require_place, write_bundle

    # A folder that is taken is refused before anything is computed.
    if Path(args.out).exists():
        require_place(Path(args.out), force=args.force)
    # PGF is drawn by running LaTeX, which many machines lack.
    formats = (*VECTOR, "pgf") if args.pgf else VECTOR
    readings, left_out = read_several(args, "analysing")
    with working("drawing"):
        folder = write_bundle(
            readings,
            Path(args.out),
            venue=args.venue,
            view=selection_of(args),
            by=args.by or "",
            formats=formats,
            force=args.force,
        )
    # as_posix: the names in the JSON are the same on every system.
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    if args.json:
        emit({"folder": str(folder), "files": files, "left_out": left_out})
        return exit_code(left_out)
    for kind in ("figures", "tables", "data", "supplement"):
        say(f"{folder / kind}: {sum(name.startswith(f'{kind}/') for name in files)} files")
    # Both ways are printed to be copied: into a paper, or compiled alone.
    say(f"In LaTeX: \\newcommand{{\\depthscopepath}}{{{folder}}} \\input{{{folder}/figures.tex}}")
    say(f"As it is: cd {shlex.quote(str(folder))} && latexmk -pdf main.tex")
    return exit_code(left_out)


COMMAND = Command("export", "write figures, tables and sources for a paper", _add_arguments, _run)
