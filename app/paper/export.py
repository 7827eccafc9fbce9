"""What does a paper need? Vector figures, booktabs tables, their numbers, the sources, the provenance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from depthscope.app.drawing.matplotlib import WIDTHS, write_figure
from depthscope.app.figures import Figure, Heatmap, Selection, available
from depthscope.app.figures.build.values import feeds
from depthscope.app.paper.latex_snippets import figures_tex, main_tex, preamble_tex, tables_tex
from depthscope.app.paper.replaced_folder import replaced_folder, write_manifest
from depthscope.app.readings.provenance import software
from depthscope.app.readings.readings import Reading, read_runs
from depthscope.app.tables.comparison import summary_table
from depthscope.app.tables.findings import findings_table
from depthscope.app.tables.formats import to_csv, to_latex, to_markdown
from depthscope.app.tables.tables import Table, depth_table, mixing_table, slug
from depthscope.app.text.bibliography import cut, keys_of, sources_of
from depthscope.diagnostics import CATALOGUE

VECTOR = ("pdf", "svg")


def write_bundle(
    runs: Mapping[str, xr.DataTree],
    out: Path,
    *,
    width: str = "icml",
    view: Selection | None = None,
    formats: Sequence[str] = VECTOR,
) -> Path:
    """Write a folder for a paper: figures/, tables/, data/, LaTeX snippets, metrics.bib and manifest.json.

    Parameters
    ----------
    runs : mapping of str to DataTree
        Runs by the names to print.
    out : Path
        Missing, empty, or written by an earlier export. Files of others in it are kept.
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
    if width not in WIDTHS:
        raise ValueError(f"width {width!r} is not known; expected {', '.join(WIDTHS)}")
    with replaced_folder(Path(out)) as folder:
        readings = read_runs(runs)
        view = shared_axis(view or Selection(), readings)
        figures, tables = draw_all(readings, view), tables_of(readings, view)
        _write_figures(figures, folder, width, formats)
        _write_tables(tables, folder)
        _write_text(folder / "data" / "findings.json", _findings_json(readings))
        _write_sources(figures, tables, readings, folder)
        _write_snippets(figures, tables, folder, width)
        write_manifest(folder, _facts(figures, readings, view, width))
    return Path(out)


def shared_axis(view: Selection, readings: Sequence[Reading]) -> Selection:
    """The selection, on relative depth where the runs differ in depth.

    Parameters
    ----------
    view : Selection
        What was asked for.
    readings : sequence of Reading
        Runs.

    Returns
    -------
    Selection
    """
    depths = {reading.analysis.sizes.get("depth") for reading in readings} - {None}
    return replace(view, axis="relative") if len(depths) > 1 else view


def draw_all(readings: Sequence[Reading], view: Selection) -> list[Figure]:
    """Every figure that the runs can feed; curves overlaid, one matrix a run.

    Parameters
    ----------
    readings : sequence of Reading
        Runs.
    view : Selection
        Slice.

    Returns
    -------
    list of Lines or Heatmap
        In display order.
    """
    analyses = {reading.name: reading.analysis for reading in readings}
    return [figure for kind in available(analyses).values() for figure in _built(kind, analyses, view)]


def _built(kind: Any, analyses: Mapping[str, xr.Dataset], view: Selection) -> Iterator[Figure]:
    able = {run: data for run, data in analyses.items() if feeds(data, kind.needs)}
    figure = kind.build(able, **asdict(view))
    if not isinstance(figure, Heatmap):
        if any(line.role == "measured" for line in figure.lines):
            yield figure
        return
    for run in able:
        single = kind.build(able, **asdict(replace(view, run=run, axis="depth")))
        yield single if len(able) == 1 else replace(single, name=f"{single.name}_{slug(run)}")


def tables_of(readings: Sequence[Reading], view: Selection) -> list[Table]:
    """Summary, findings, and each run by depth and by connection.

    Parameters
    ----------
    readings : sequence of Reading
        Runs.
    view : Selection
        Slice.

    Returns
    -------
    list of Table
    """
    by_connection = [mixing_table(reading, view) for reading in readings]
    return [
        summary_table(readings, view),
        findings_table(readings),
        *(depth_table(reading, view) for reading in readings),
        *(table for table in by_connection if table is not None),
    ]


# --- files


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def _write_figures(figures: Sequence[Figure], folder: Path, width: str, formats: Sequence[str]) -> None:
    (folder / "figures").mkdir()
    for figure in figures:
        paths = (folder / "figures" / f"{figure.name}.{ending}" for ending in formats)
        write_figure(figure, *paths, width=width)
        _write_text(folder / "data" / f"{figure.name}.csv", figure_csv(figure))


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
    if isinstance(figure, Heatmap):
        matrix = pd.DataFrame(figure.z, index=pd.Index(figure.y, name=figure.y_label), columns=figure.x)
        return matrix.to_csv(lineterminator="\n")
    parts = [
        pd.DataFrame(
            {
                "line": line.label,
                "role": line.role,
                "x": line.x,
                "y": line.y,
                "lower": np.nan if line.lower is None else line.lower,
                "upper": np.nan if line.upper is None else line.upper,
            }
        )
        for line in figure.lines
    ]
    return pd.concat(parts, ignore_index=True).to_csv(index=False, lineterminator="\n")


def _write_tables(tables: Sequence[Table], folder: Path) -> None:
    cites = _cites()
    for table in tables:
        for ending, text in (
            ("tex", to_latex(table, cites)),
            ("csv", to_csv(table)),
            ("md", to_markdown(table)),
        ):
            _write_text(folder / "tables" / f"{table.name}.{ending}", text)


def _findings_json(readings: Sequence[Reading]) -> str:
    found = {reading.name: [finding.as_dict() for finding in reading.findings] for reading in readings}
    return json.dumps(found, indent=2, default=str, ensure_ascii=False) + "\n"


def _cites() -> dict[str, str]:
    return {name: metric.cite for name, metric in CATALOGUE.items()}


def _write_sources(
    figures: Sequence[Figure], tables: Sequence[Table], readings: Sequence[Reading], folder: Path
) -> None:
    cites = _cites()
    metrics = {figure.metric for figure in figures} | {metric for table in tables for metric in table.metrics}
    verdicts = [finding.source for reading in readings for finding in reading.findings]
    laws = [key for figure in figures for key in sources_of(figure)]
    keys = keys_of([*(cites.get(metric, "") for metric in metrics), *verdicts, *laws])
    _write_text(folder / "metrics.bib", cut(keys))


def _write_snippets(figures: Sequence[Figure], tables: Sequence[Table], folder: Path, width: str) -> None:
    _write_text(folder / "figures.tex", figures_tex(figures, _cites(), width))
    _write_text(folder / "tables.tex", tables_tex(tables))
    _write_text(folder / "preamble.tex", preamble_tex())
    _write_text(folder / "main.tex", main_tex(width))


def _facts(
    figures: Sequence[Figure], readings: Sequence[Reading], view: Selection, width: str
) -> dict[str, Any]:
    return {
        "made_by": "depthscope export",
        "software": software(),
        "width": width,
        "selection": asdict(view),
        "runs": {reading.name: dict(reading.attrs) for reading in readings},
        "figures": {
            figure.name: {"metric": figure.metric, "caption": figure.caption, "alt": figure.alt}
            for figure in figures
        },
    }
