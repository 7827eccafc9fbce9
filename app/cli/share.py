"""The commands that show runs to others: dashboard, report, export."""

from __future__ import annotations

import argparse
from pathlib import Path

from depthscope.app.cli.analyze import view_of
from depthscope.app.cli.parser import FINE
from depthscope.app.cli.terminal import emit, say, working
from depthscope.app.readings.readings import open_runs


def report(args: argparse.Namespace) -> int:
    """Write one HTML file.

    Parameters
    ----------
    args : Namespace
        ``runs, out, json`` and the slice.

    Returns
    -------
    int
        Exit code.
    """
    from depthscope.app.report.report import write_report

    with working("analysing and drawing"):
        path = write_report(open_runs(args.runs), Path(args.out), view=view_of(args))
    if args.json:
        emit({"report": str(path), "bytes": path.stat().st_size})
    else:
        say(f"{path} ({path.stat().st_size / 1e6:.1f} MB, needs no other file)")
    return FINE


def export(args: argparse.Namespace) -> int:
    """Write figures, tables and sources for a paper.

    Parameters
    ----------
    args : Namespace
        ``runs, out, width, pgf, json`` and the slice.

    Returns
    -------
    int
        Exit code.
    """
    from depthscope.app.paper.export import VECTOR, write_bundle

    formats = (*VECTOR, "pgf") if args.pgf else VECTOR
    with working("analysing and drawing"):
        folder = write_bundle(
            open_runs(args.runs), Path(args.out), width=args.width, view=view_of(args), formats=formats
        )
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    if args.json:
        emit({"folder": str(folder), "files": files})
        return FINE
    for kind in ("figures", "tables", "data"):
        say(f"{folder / kind}: {sum(name.startswith(f'{kind}/') for name in files)} files")
    say(f"In LaTeX: \\newcommand{{\\depthscopepath}}{{{folder}}} \\input{{{folder}/figures.tex}}")
    say(f"As it is: cd {folder} && latexmk -pdf main.tex")
    return FINE


def dashboard(args: argparse.Namespace) -> int:
    """Browse runs at a local address until interrupted.

    Parameters
    ----------
    args : Namespace
        ``runs, port, browser``.

    Returns
    -------
    int
        Exit code.
    """
    from depthscope.app.dashboard.server import launch

    launch([Path(run) for run in args.runs], port=args.port, open_browser=args.browser)
    return FINE
