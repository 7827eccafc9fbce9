"""How is a table set in a paper? As one float with booktabs rules, eight points high, that is never wider than the text."""

from __future__ import annotations

import re
from collections.abc import Mapping

from depthscope.app.tables.tables import Table, spoken
from depthscope.app.text.bibliography import keys_of
from depthscope.app.text.latex import CITEP, Latex, cite, tex, with_citations
from depthscope.app.text.numbers import UNDEFINED
from depthscope.app.text.venues import VENUES, Venue

MOST_ROWS, MOST_COLUMNS = 40, 11
"""That a page holds at a size that is read; the CSV has all."""

FEW_RUNS, MANY_COLUMNS = 6, 9
"""A table of so few rows and so many columns is turned: the columns of one run below each other."""

_BASELINE = re.compile(r" \(baseline [^)]*\)")
_NUMBER = re.compile(r"[−-]?\d")


def to_latex(table: Table, cites: Mapping[str, str], venue: Venue = VENUES["plain"]) -> str:
    """A table as a float.

    ``cites``: bibliography key by metric.
    Returns: Needs the packages amsmath, array, booktabs and graphicx.
    """
    rows, columns = table.printed.shape
    is_turned = rows <= FEW_RUNS and columns > MANY_COLUMNS
    shown = (
        table.printed
        if is_turned
        else table.printed.iloc[:MOST_ROWS, :MOST_COLUMNS].replace(_BASELINE, "", regex=True)
    )
    names = list(map(str, shown.columns))
    frame = shown.set_axis(range(len(names)), axis=1).astype(object)
    for column, name in enumerate(names):
        frame[column] = [_cell(table, name, str(cell)) for cell in frame[column]]
    frame.columns = [tex(name) for name in names]
    shape = "".join(_shape(table, name) for name in names)
    if is_turned:
        first = str(frame.columns[0])
        frame = frame.set_index(first).T.reset_index(names=first)
        shape = "l" + "r" * len(shown)
    body = frame.style.hide(axis="index").to_latex(column_format=f"@{{}}{shape}@{{}}", hrules=True)
    left_out = f"{len(shown)} of {rows} rows, {len(names)} of {columns} columns; the CSV has all."
    notes = [*table.notes, *([left_out] if shown.shape != table.printed.shape else [])]
    environment = "table*" if venue.two_columns else "table"
    # A table that is too wide is set smaller: nothing leaves the page.
    return "\n".join(
        [
            CITEP,
            rf"\begin{{{environment}}}[tbp]",
            rf"\centering\caption{{{tex(table.caption)}{_symbols(table, cites)}}}",
            rf"\label{{tab:{tex(table.name)}}}\par\vspace{{4pt}}",
            r"{\fontsize{8}{9.6}\selectfont\setlength{\tabcolsep}{4pt}%",
            r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
            body.rstrip() + "}}",
            rf"\par\vspace{{3pt}}\parbox{{\textwidth}}{{\raggedright\fontsize{{7}}{{8.4}}\selectfont {tex(' '.join(notes))}}}"
            if notes
            else "",
            rf"\end{{{environment}}}",
            "",
        ]
    )


def _shape(table: Table, name: str) -> str:
    if name in table.wrapped:
        return r">{\raggedright\arraybackslash}p{0.55\textwidth}"
    cells = [cell for cell in map(str, table.printed[name]) if cell != UNDEFINED]
    return "r" if cells and name not in table.cited and all(map(_NUMBER.match, cells)) else "l"


def _cell(table: Table, name: str, text: str) -> Latex:
    # "depthscope's default" is no key: it is printed as text.
    keys = keys_of([text]) if name in table.cited else []
    if keys:
        return cite(keys)
    return with_citations(text) if name in table.wrapped else tex(text)


def _symbols(table: Table, cites: Mapping[str, str]) -> str:
    parts = []
    for metric, symbol in table.symbols.items():
        keys = keys_of([cites.get(metric, "")])
        parts.append(f"{tex(spoken(metric))} ${symbol}${f'~{cite(keys)}' if keys else ''}")
    return f" Symbols: {'; '.join(parts)}." if parts else ""
