"""How is a result sent around? As one HTML file: findings, figures, numbers, provenance."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xarray as xr
from markupsafe import Markup

from depthscope.app.drawing.matplotlib import to_svg
from depthscope.app.figures import Figure, Selection
from depthscope.app.paper.contents import Contents
from depthscope.app.readings.provenance import software
from depthscope.app.readings.readings import Reading, read_runs
from depthscope.app.tables.findings import NOTHING, count_words, findings_text, place_of
from depthscope.app.tables.formats import to_csv
from depthscope.app.tables.tables import spoken
from depthscope.app.text.bibliography import bibliography, cited, entries
from depthscope.app.text.numbers import number
from depthscope.app.text.templates import html_template
from depthscope.app.text.visible import LONGEST_TEXT, shortened

__all__ = ["findings_text", "to_html", "write_report"]

# Attributes of a run that identify it, with their printed names.
_DESCRIBED = {"model": "model", "family": "family", "n_streams": "streams", "dtype": "dtype"}


def write_report(runs: Mapping[str, xr.DataTree], out: Path, *, view: Selection | None = None) -> Path:
    """Write the report of some runs; an earlier one is replaced only when the new one is complete.

    Parameters
    ----------
    runs : mapping of str to DataTree
        Runs by the names to print.
    out : Path
        HTML file.
    view : Selection, optional
        Which slice of the numbers figures and tables show.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        For no run, or a name that does not end in ``.html``.
    """
    out = Path(out)
    # Before the runs are analysed; browsers open a file by its ending.
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"a report is an HTML file; got {out.name!r}, expected such as report.html")
    text = to_html(read_runs(runs), view=view)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written in the same folder first: a rename within one file system is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        fresh = Path(folder) / out.name
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, out)
    return out


def to_html(readings: Sequence[Reading], *, view: Selection | None = None) -> str:
    """The report as one HTML document that asks nothing of any network.

    Parameters
    ----------
    readings : sequence of Reading
        Runs.
    view : Selection, optional
        Slice.

    Returns
    -------
    str
    """
    contents = Contents.of(readings, view)
    known = entries(bibliography())
    page = html_template(
        "depthscope.app.report",
        "report.html.jinja",
        cited=cited,
        counts=count_words,
        csv=to_csv,
        fact=_fact,
        number=lambda value: number(float(value)),
        place=place_of,
        spoken=spoken,
        svg=_svg,
    )
    return page.render(
        bibtex="\n".join(known[key] for key in contents.sources),
        contents=contents,
        described=[_description(reading.attrs) for reading in readings],
        names=", ".join(reading.name for reading in readings),
        nothing=NOTHING,
        software=software(),
    )


def _svg(figure: Figure) -> Markup:
    """The drawing with its text alternative; matplotlib has escaped the words inside it."""
    opening = Markup('<svg role="img" aria-label="{}" ').format(figure.alt or figure.title)
    return Markup(to_svg(figure, width="full").replace("<svg ", opening, 1))


def _description(attrs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    # A run of another tool may lack any of them.
    return [(name, attrs[key]) for key, name in _DESCRIBED.items() if attrs.get(key) is not None]


def _fact(value: Any) -> str:
    if value is None:
        return "unknown"
    # Lists and mappings as JSON: Python's own form has single quotes and None.
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return shortened(text, LONGEST_TEXT)
