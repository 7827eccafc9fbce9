"""What does a paper need? Figures and tables, the methods, the sources, the provenance, and every number as a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope.app.drawing.matplotlib import FIGURE_POINTS, Width, write_figure
from depthscope.app.figures import Figure, Heatmap, Selection
from depthscope.app.figures.composed import EVERYWHERE, QUESTIONS, Composed, Subjects, composed_of, groups_of
from depthscope.app.figures.specification import figure_table
from depthscope.app.paper.contents import CITES, Contents
from depthscope.app.paper.methods import methods_latex, methods_text
from depthscope.app.readings.provenance import file_digest, software
from depthscope.app.readings.readings import Reading, read_runs
from depthscope.app.tables.comparison import comparison_table
from depthscope.app.tables.formats import csv_text, to_csv, to_latex, to_parquet
from depthscope.app.tables.tables import Table
from depthscope.app.text.bibliography import cut, keys_of
from depthscope.app.text.latex import CITEP, Latex, Venue, latex_template, venue_of
from depthscope.diagnostics import atomic_writes
from depthscope.diagnostics.errors import InputError

VECTOR = ("pdf", "svg")
MANIFEST, MADE_BY = "manifest.json", "depthscope export"
MOST_COMPARED = 8
"""Runs up to which a table has them side by side; the table of runs has all. A heuristic of ours: a column each."""


@dataclass(frozen=True)
class Bundle:
    """Everything that is written.

    ``contents``: runs, single figures, and tables.
    ``composed``: the figures of the text, those without a panel included.
    ``venue``: whose page it is for.
    ``by``: attribute by which runs are grouped.
    ``formats``: of the figures.
    """

    contents: Contents
    composed: tuple[Composed, ...]
    venue: Venue
    by: str
    formats: tuple[str, ...]

    @property
    def shown(self) -> tuple[Composed, ...]:
        """The composed figures that have a panel."""
        return tuple(figure for figure in self.composed if figure.panels)

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tables of the text."""
        return (self.contents.summary, self.contents.findings)

    @cached_property
    def further_tables(self) -> tuple[Table, ...]:
        """Tables that are files of numbers alone: runs side by side, and every run by depth."""
        tables = list(self.contents.tables)
        if 1 < len(self.contents.readings) <= MOST_COMPARED:
            # Runs of weights alone have none of the compared metrics.
            with contextlib.suppress(ValueError):
                tables.append(comparison_table(self.contents.readings, view=self.contents.view))
        return tuple(tables)


def write_bundle(
    runs: Mapping[str, xr.DataTree] | Sequence[Reading],
    out: Path,
    *,
    venue: str = "icml",
    view: Selection | None = None,
    by: str = "",
    formats: Sequence[str] = VECTOR,
    force: bool = False,
) -> Path:
    """Write a folder for a paper: composed figures, tables, methods, metrics.bib, every number, and manifest.json.

    Parameters
    ----------
    runs : mapping of str to DataTree, or sequence of Reading
        Runs by the names to print, or what `read_runs` made of them.
    out : Path
        A new folder, or an empty one.
    venue : str
        ``"icml"``, ``"neurips"``, ``"iclr"``, ``"acl"``, ``"cvpr"``, ``"ieee"`` or ``"plain"``.
    view : Selection, optional
        Which slice of the numbers figures and tables show.
    by : str
        Attribute that the runs of a group share, such as ``"family"``: figures show means over the runs of a group.
    formats : sequence of str
        Formats of the figures. PDF is always among them: the snippets include it.
    force : bool
        Replace a folder that an earlier export wrote, with all that is in it; a folder of anything else never is.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        For an unknown venue, no run, or a folder that has files in it.
    """
    # Before the runs are analysed, which takes far longer.
    page = venue_of(venue)
    # Analysed inside: a folder that is taken is refused before anything is computed.
    with atomic_writes.replaced_folder(Path(out), check=partial(require_place, force=force)) as folder:
        bundle = make_bundle(runs, page, view=view, by=by, formats=formats)
        write_files(bundle, folder)
    return Path(out)


def require_place(target: Path, *, force: bool = False) -> None:
    """Refuse a file, and a folder with files in it; with ``force`` unless an export wrote it."""
    if not target.is_dir():
        raise InputError(f"{target} is a file; name a folder to write to")
    if not os.listdir(target):
        return
    if not force:
        raise InputError(
            f"{target} has files in it; name a new folder with --out, or replace a folder of an earlier export with --force"
        )
    try:  # a manifest of ours begins with this; one of another program does not
        with open(atomic_writes.open_below(target, MANIFEST), "rb") as file:
            is_ours = MADE_BY in file.read(200).decode(errors="replace")
    except OSError:
        is_ours = False
    if not is_ours:
        raise InputError(
            f"{target} is not a folder that depthscope export wrote; name a new folder with --out"
        )


def _write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """The facts and the SHA-256 of every file, sorted: the order of a listing differs between systems."""
    names = sorted(entry.relative_to(folder) for entry in folder.rglob("*") if entry.is_file())
    files = {name.as_posix(): hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    text = json.dumps(
        {"made_by": MADE_BY, **facts, "files": files}, indent=2, default=str, ensure_ascii=False
    )
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def make_bundle(
    runs: Mapping[str, xr.DataTree] | Sequence[Reading],
    venue: Venue,
    *,
    view: Selection | None,
    by: str,
    formats: Sequence[str],
) -> Bundle:
    """Everything that is written, before it is drawn."""
    trees = runs if isinstance(runs, Mapping) else {}
    readings = read_runs(runs) if isinstance(runs, Mapping) else list(runs)
    contents = Contents.of(readings, view)
    subjects = Subjects(tuple(readings), trees, groups_of(readings, by))
    composed = tuple(
        composed_of(question, subjects, contents.view, varied=True) for question in QUESTIONS.values()
    )
    return Bundle(contents, composed, venue, by, tuple(dict.fromkeys(("pdf", *formats))))


def write_files(bundle: Bundle, folder: Path) -> None:
    """Write the files of a bundle into an empty folder."""
    (folder / "figures").mkdir()  # savefig makes no folder
    for one in bundle.shown:
        for ending in bundle.formats:
            across = Width(bundle.venue.text, FIGURE_POINTS)
            write_figure(one, folder / "figures" / f"{one.name}.{ending}", width=across)
    texts = _texts(bundle)
    for name, text in texts.items():
        path = folder / name
        atomic_writes.made_folder(path.parent)
        path.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system
    for table in bundle.tables + bundle.further_tables:
        place = "tables" if table in bundle.tables else "data"
        (folder / place / f"{table.name}.parquet").write_bytes(to_parquet(table))
    _write_manifest(folder, _facts(bundle))


def _texts(bundle: Bundle) -> dict[str, str]:
    """Everything but the drawings: file name to text."""
    contents, venue = bundle.contents, bundle.venue
    found = {
        reading.name: [finding.as_dict() for finding in reading.findings] for reading in contents.readings
    }
    measured = _measured(bundle)
    flat = [
        f"{figure.title}: {title}"
        for figure in bundle.composed
        for title, reason in figure.left_out.items()
        if reason.endswith(EVERYWHERE)
    ]
    described = (contents.readings, contents.view, measured, bundle.by, flat)
    texts = {
        "data/findings.json": json.dumps(found, indent=2, default=str, ensure_ascii=False) + "\n",
        "figures.tex": figures_tex(bundle.shown, CITES, venue),
        "tables.tex": tables_tex(bundle.tables),
        "methods.tex": methods_tex(methods_latex(*described)),
        "methods.txt": methods_text(*described),
    }
    for figure in bundle.shown:
        for panel in figure.panels:
            texts[f"data/{figure.name}_{panel.key}.csv"] = figure_csv(panel.content)
    for single in contents.figures:
        texts[f"data/{single.name}.csv"] = figure_csv(single)
    for table in bundle.further_tables:
        texts[f"data/{table.name}.csv"] = to_csv(table)
    for table in bundle.tables:
        texts[f"tables/{table.name}.tex"] = to_latex(table, CITES, venue)
        texts[f"tables/{table.name}.csv"] = to_csv(table)
    keys = cited_keys(text for name, text in texts.items() if name.endswith(".tex"))
    return texts | {"metrics.bib": cut(keys), "main.tex": main_tex(venue, cites=bool(keys))}


def _measured(bundle: Bundle) -> list[str]:
    """The metrics of the text, which the methods define."""
    shown = [metric for figure in bundle.shown for metric in figure.metrics]
    return list(dict.fromkeys([*shown, *(metric for table in bundle.tables[:1] for metric in table.metrics)]))


def figure_csv(figure: Figure) -> str:
    """The numbers that a figure draws: a row a point, or the matrix under the positions of its columns."""
    table = figure_table(figure).drop(columns="where")
    if isinstance(figure, Heatmap):
        table = table.rename(columns={"y": figure.y_label})
    # The same bytes on every system, so that the hashes of the manifest agree.
    return csv_text(table)


def _facts(bundle: Bundle) -> dict[str, Any]:
    contents = bundle.contents
    return {
        "software": software(),
        "venue": bundle.venue.name,
        # As it was applied: of runs of different depth the axis was changed.
        "selection": asdict(contents.view),
        "by": bundle.by,
        "formats": list(bundle.formats),
        "runs": {
            reading.name: {
                "path": reading.path,
                "file_sha256": file_digest(reading.path),
                "attributes": dict(reading.attrs),
            }
            for reading in contents.readings
        },
        "figures": {
            figure.name: {
                "panels": {panel.key: panel.title for panel in figure.panels},
                "metrics": list(figure.metrics),
                "caption": figure.caption,
                "alt": figure.alt,
            }
            for figure in bundle.shown
        },
        "left_out": {figure.name: dict(figure.left_out) for figure in bundle.composed if figure.left_out},
        "data": {
            figure.name: {"metric": figure.metric, "caption": figure.caption} for figure in contents.figures
        },
    }


_HERE = "depthscope.app.paper"
PACKAGES = "amsmath,array,booktabs,graphicx"
HEAD = f"{CITEP}\n\\providecommand{{\\depthscopepath}}{{.}}\n"
_CITE = re.compile(r"\\citep\{([^}]+)\}")


def _head(name: str) -> Latex:
    """What a document needs before it inputs a snippet."""
    return Latex(
        "% Written by depthscope. In your document:\n"
        rf"%   \usepackage{{{PACKAGES}}}" + "\n"
        "%   \\newcommand{\\depthscopepath}{paper}  % the folder of this file, seen from your document\n"
        rf"%   \input{{\depthscopepath/{name}.tex}}" + "\n" + HEAD
    )


def figures_tex(figures: Sequence[Composed], cites: Mapping[str, str], venue: Venue) -> str:
    """A float across the text for every composed figure."""
    cited = [
        (figure, keys_of([*(cites.get(metric, "") for metric in figure.metrics), *figure.sources]))
        for figure in figures
    ]
    return latex_template(_HERE, "figures.tex.jinja").render(
        head=_head("figures"), figures=cited, environment="figure*" if venue.two_columns else "figure"
    )


def tables_tex(tables: Sequence[Table]) -> str:
    """An input for every table of the text."""
    return latex_template(_HERE, "tables.tex.jinja").render(head=_head("tables"), tables=tables)


def methods_tex(paragraphs: Sequence[Latex]) -> str:
    """The methods as paragraphs."""
    return "% Written by depthscope: what was measured, and how.\n" + HEAD + "\n\n".join(paragraphs) + "\n"


def main_tex(venue: Venue, *, cites: bool) -> str:
    """A sample article that compiles: methods, composed figures, tables, and sources."""
    return latex_template(_HERE, "main.tex.jinja").render(
        options=Latex(f"{venue.body}pt" + (",twocolumn" if venue.two_columns else "")),
        geometry=Latex(
            f"textwidth={venue.text:.4f}in,textheight={venue.height:.4f}in"
            + (f",columnsep={venue.separation:.4f}in" if venue.two_columns else "")
        ),
        packages=PACKAGES,
        cites=cites,
        natbib=venue.author_year,
        two_columns=venue.two_columns,
    )


def cited_keys(texts: Iterable[str]) -> list[str]:
    """The bibliography keys that some LaTeX cites."""
    return sorted({key for text in texts for group in _CITE.findall(text) for key in group.split(",")})
