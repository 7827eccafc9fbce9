"""How is a result sent around? As one HTML file: findings, figures, numbers, provenance."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import xarray as xr
from markupsafe import Markup

from depthscope.app.drawing.matplotlib import to_svg
from depthscope.app.figures import Figure, Lines, Selection
from depthscope.app.paper.contents import Contents
from depthscope.app.readings.depth_map import summary_of
from depthscope.app.readings.provenance import software
from depthscope.app.readings.readings import Reading, read_runs
from depthscope.app.tables.findings import NOTHING, cards_of, count_words
from depthscope.app.tables.formats import to_csv
from depthscope.app.text.bibliography import bibliography, entries
from depthscope.app.text.cards import ABOUT_THE_READING, Card
from depthscope.app.text.latex import html_template
from depthscope.app.text.notebook import card_html
from depthscope.app.text.visible import LONGEST_TEXT, shortened
from depthscope.diagnostics.atomic_writes import replaced_file
from depthscope.diagnostics.errors import InputError, TakenError

__all__ = ["to_html", "write_report"]

# Attributes of a run that identify it, with their printed names.
_DESCRIBED = {
    "model": "model",
    "family": "family",
    "n_streams": "streams",
    "constraint": "H_res",
    "proof": "reading",
    "dtype": "dtype",
}


_PLACES = re.compile(r' (?:d|x|y)="[^"]*"')
_STYLE = re.compile(r' style="([^"]*)"')
_DIGITS = re.compile(r"(\.\d)\d+")
_UNTURNED = re.compile(r' transform="rotate\(-?0 [^"]*"')

# In the head of every report: by this the next one knows that it may take its place. Browsers ignore it.
MARK = '<meta name="generator" content="depthscope report">'


def write_report(
    runs: Mapping[str, xr.DataTree] | Sequence[Reading],
    out: Path,
    *,
    force: bool = False,
    view: Selection | None = None,
) -> Path:
    """Write the report of some runs. An earlier one is replaced in one step, when the new one is complete.

    ``runs``: runs by the names to print, or what `read_runs` made of them.
    ``force``: also replace a file that is no report.
    ``view``: which slice of the numbers figures and tables show.
    Raises InputError: For no run, or a name that does not end in ``.html``.
    Raises OSError: Where the file cannot be written; FileExistsError where one is there that is no report.
    """
    out = Path(out)
    # Before the runs are analysed; browsers open a file by its ending.
    if out.suffix not in (".html", ".htm"):
        raise InputError(f"a report is an HTML file; got {out.name!r}, expected such as report.html")
    # Analysed inside: a file of somebody else is refused before anything is computed.
    with replaced_file(out, check=None if force else require_report) as fresh:
        readings = read_runs(runs) if isinstance(runs, Mapping) else runs
        fresh.write_text(to_html(readings, view=view), encoding="utf-8")
    return out


def require_report(path: Path) -> None:
    """Refuse to replace a file that is no report."""
    with path.open("rb") as file:
        head = file.read(4096)
    if MARK.encode() not in head:
        raise TakenError(
            f"{path} exists and is not a report of depthscope; name another file, delete it, or replace it with --force"
        )


def to_html(readings: Sequence[Reading], *, view: Selection | None = None) -> str:
    """The report as one HTML document that asks nothing of any network."""
    readings = sorted(readings, key=lambda reading: summary_of(reading).badness)
    contents = Contents.of(readings, view)
    known = entries(bibliography())
    evidence = _Evidence(contents.figures)
    styles = _Styles()
    page = html_template(
        "depthscope.app.report",
        "report.html.jinja",
        cards=partial(cards_of, sent=True),
        counts=count_words,
        csv=to_csv,
        fact=_fact,
        card_html=card_html,
        evidence=evidence,
        svg=partial(_svg, styles),
    )
    return page.render(
        bibtex="\n".join(known[key] for key in contents.sources),
        contents=contents,
        mark=Markup(MARK),
        # A run of another tool may lack any of them.
        described=[
            [(name, each.attrs[key]) for key, name in _DESCRIBED.items() if each.attrs.get(key) is not None]
            for each in readings
        ],
        names=", ".join(reading.name for reading in readings),
        shown=evidence.shown,
        nothing=NOTHING,
        about_the_reading=ABOUT_THE_READING,
        software=software(),
        styles=styles,
    )


class _Evidence:
    """The figure that shows a finding, each once: a second finding on the same metric needs no second copy."""

    def __init__(self, figures: Sequence[Figure]):
        self._figures = figures
        self.shown: set[str] = set()

    def __call__(self, card: Card, reading: Reading) -> Figure | None:
        for figure in self._figures:
            of_this_run = isinstance(figure, Lines) or figure.run == reading.name
            if of_this_run and figure.metric == card.finding.metric and figure.name not in self.shown:
                self.shown.add(figure.name)
                return figure
        return None


class _Styles:
    """The styles of all drawings, each written once: matplotlib repeats them at every mark."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def shared(self, drawing: str) -> str:
        """A drawing with classes in place of its styles."""
        return _STYLE.sub(
            lambda found: f' class="f{self._numbers.setdefault(found[1], len(self._numbers))}"', drawing
        )

    def sheet(self) -> Markup:
        """The rules of these classes, for the end of the page."""
        return Markup("").join(
            # Inside a style element nothing ends it but "</", and no style of matplotlib has a "<".
            Markup(f".f{number}{{{style.replace('<', '')}}}")
            for style, number in self._numbers.items()
        )


def _svg(styles: _Styles, figure: Figure) -> Markup:
    """The drawing with its text alternative; matplotlib has escaped the words inside it."""
    opening = Markup('<svg role="img" aria-label="{}" ').format(figure.alt or figure.title)
    drawing = to_svg(figure, width="full").replace("<svg ", opening, 1)
    # A tenth of a point is finer than any screen; matplotlib writes millionths, a third of the file.
    drawing = _PLACES.sub(lambda found: _DIGITS.sub(r"\1", found[0]), _UNTURNED.sub("", drawing))
    return Markup(styles.shared(drawing.replace(" xlink:href=", " href=")))


def _fact(value: Any) -> str:
    if value is None:
        return "unknown"
    # Lists and mappings as JSON: Python's own form has single quotes and None.
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return shortened(text, LONGEST_TEXT)
