"""`depthscope export`: figures, tables and sources as a folder that a paper includes, or one HTML report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from depthscope.app.cli.main import FINE, FOUND
from depthscope.app.cli.options import Force, Json, MaxBytes, Runs, Select, option, read_several, selection_of
from depthscope.app.text.terminal import emit, say, working
from depthscope.diagnostics.errors import InputError


def export(
    runs: Runs,
    out: Annotated[
        Path, option("DIR|FILE.html", "A new folder for a paper, or one HTML file to send around.")
    ],
    venue: Annotated[str, option("icml|neurips|iclr|acl|cvpr|ieee|plain", "Whose page layout.")] = "icml",
    by: Annotated[
        str, option("ATTRIBUTE", "Group runs by it, such as family: means with bands over seeds.")
    ] = "",
    select: Select = None,
    force: Force = False,
    json: Json = False,
    max_bytes: MaxBytes = None,
) -> int:
    """Write a paper's figures and tables, or a report.

    A folder with figures, tables, methods, sources and a manifest; or one HTML file that needs nothing else.
    """
    view = selection_of(select)
    if out.suffix in (".html", ".htm"):
        from depthscope.app.report.report import write_report

        if out.exists() and not force:
            raise InputError(f"{out} exists; name another file, or add --force to replace it")
        readings, left_out = read_several(runs, max_bytes, "analysing")
        with working("drawing"):
            path = write_report(readings, out, force=force, view=view)
        if json:
            emit({"report": str(path), "bytes": path.stat().st_size, "left_out": left_out})
        else:
            say(f"{path} ({path.stat().st_size / 1e6:.1f} MB, needs no other file)")
        return FOUND if left_out else FINE
    from depthscope.app.paper.export import require_place, write_bundle

    # A folder that is taken is refused before anything is computed.
    if out.exists():
        require_place(out, force=force)
    readings, left_out = read_several(runs, max_bytes, "analysing")
    with working("drawing"):
        folder = write_bundle(readings, out, venue=venue, view=view, by=by, force=force)
    # as_posix: the names in the JSON are the same on every system.
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    if json:
        emit({"folder": str(folder), "files": files, "left_out": left_out})
        return FOUND if left_out else FINE
    for kind in ("figures", "tables", "data"):
        say(f"{folder / kind}: {sum(name.startswith(f'{kind}/') for name in files)} files")
    # Both ways are printed to be copied: into a paper, or compiled alone.
    say(f"In LaTeX: \\newcommand{{\\depthscopepath}}{{{folder}}} \\input{{{folder}/figures.tex}}")
    say(f"As it is: cd {shlex.quote(str(folder))} && latexmk -pdf main.tex")
    return FOUND if left_out else FINE
