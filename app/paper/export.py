"""What does a paper need? Vector figures, booktabs tables, their numbers, the sources, the provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope.app.drawing.matplotlib import WIDTHS, write_figure
from depthscope.app.figures import Figure, Heatmap, Selection
from depthscope.app.figures.numbers import figure_table
from depthscope.app.paper.contents import CITES, Contents
from depthscope.app.paper.latex_snippets import figures_tex, main_tex, preamble_tex, tables_tex
from depthscope.app.paper.replaced_folder import replaced_folder, write_manifest
from depthscope.app.readings.provenance import software
from depthscope.app.readings.readings import Reading, read_runs
from depthscope.app.tables.formats import csv_text, to_csv, to_latex, to_markdown
from depthscope.app.text.bibliography import cut

VECTOR = ("pdf", "svg")


def write_bundle(
    runs: Mapping[str, xr.DataTree] | Sequence[Reading],
    out: Path,
    *,
    width: str = "icml",
    view: Selection | None = None,
    formats: Sequence[str] = VECTOR,
) -> Path:
    """Write a folder for a paper: figures/, tables/, data/, LaTeX snippets, metrics.bib and manifest.json.

    Parameters
    ----------
    runs : mapping of str to DataTree, or sequence of Reading
        Runs by the names to print, or what `read_runs` made of them.
    out : Path
        Missing, empty, or written by an earlier export. Files of others in it stay.
    width : str
        ``"icml"``, ``"neurips"`` or ``"full"``.
    view : Selection, optional
        Which slice of the numbers figures and tables show.
    formats : sequence of str
        Formats of the figures; PGF needs a LaTeX installation.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        For an unknown width, no run, a foreign folder, or a bundle with edited files.
    """
    # Before the runs are analysed, which takes far longer.
    if width not in WIDTHS:
        raise ValueError(f"width {width!r} is not known; expected {', '.join(WIDTHS)}")
    # Analysed inside: a folder of somebody else is refused before anything is computed.
    with replaced_folder(Path(out)) as folder:
        readings = read_runs(runs) if isinstance(runs, Mapping) else runs
        contents = Contents.of(readings, view)
        _write_figures(contents, folder, width, formats)
        _write_texts(_texts(contents, width), folder)
        write_manifest(folder, _facts(contents, width))
    return Path(out)


def _write_figures(contents: Contents, folder: Path, width: str, formats: Sequence[str]) -> None:
    # savefig makes no folder.
    (folder / "figures").mkdir()
    for figure in contents.figures:
        paths = [folder / "figures" / f"{figure.name}.{ending}" for ending in formats]
        write_figure(figure, *paths, width=width)


def _write_texts(texts: Mapping[str, str], folder: Path) -> None:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system


def _texts(contents: Contents, width: str) -> dict[str, str]:
    """Everything but the drawings: file name to text."""
    tables = (contents.summary, contents.findings, *contents.tables)
    found = {
        reading.name: [finding.as_dict() for finding in reading.findings] for reading in contents.readings
    }
    texts = {
        "data/findings.json": json.dumps(found, indent=2, default=str, ensure_ascii=False) + "\n",
        "metrics.bib": cut(contents.sources),
        "figures.tex": figures_tex(contents.figures, CITES, width),
        "tables.tex": tables_tex(tables),
        "preamble.tex": preamble_tex(),
        "main.tex": main_tex(width),
    }
    for figure in contents.figures:
        texts[f"data/{figure.name}.csv"] = figure_csv(figure)
    for table in tables:
        texts[f"tables/{table.name}.tex"] = to_latex(table, CITES)
        texts[f"tables/{table.name}.csv"] = to_csv(table)
        texts[f"tables/{table.name}.md"] = to_markdown(table)
    return texts


def figure_csv(figure: Figure) -> str:
    """The numbers that a figure draws: a row a point, or the matrix under the positions of its columns.

    Parameters
    ----------
    figure : Lines or Heatmap
        A figure.

    Returns
    -------
    str
        CSV; empty cells are undefined.
    """
    table = figure_table(figure).drop(columns="where")
    if isinstance(figure, Heatmap):
        table = table.rename(columns={"y": figure.y_label})
    # The same bytes on every system, so that the hashes of the manifest agree.
    return csv_text(table)


def _facts(contents: Contents, width: str) -> dict[str, Any]:
    return {
        "software": software(),
        "width": width,
        # As it was applied: of runs of different depth the axis was changed.
        "selection": asdict(contents.view),
        "runs": {reading.name: dict(reading.attrs) for reading in contents.readings},
        "figures": {
            figure.name: {"metric": figure.metric, "caption": figure.caption, "alt": figure.alt}
            for figure in contents.figures
        },
    }
