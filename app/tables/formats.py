"""How is a table written to a file? As LaTeX with booktabs rules, as CSV, as Parquet."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from depthscope.app.tables.tables import Table
from depthscope.app.text.bibliography import keys_of
from depthscope.app.text.latex import CITEP, VENUES, Latex, Venue, cite, tex
from depthscope.app.text.numbers import UNDEFINED
from depthscope.app.text.visible import visible

_FORMULA_SIGNS = tuple("=+-@＝＋－＠")  # with the wide forms that spreadsheets of East Asia take too


def to_csv(table: Table) -> str:
    """The numbers of a table at full precision."""
    return csv_text(table.data)


def to_parquet(table: Table) -> bytes:
    """The numbers of a table at full precision, with their types.

    Returns: The same for the same numbers and the same pyarrow. A column of several types, such as a threshold that is
    missing in one row, is text where it is no number.
    """
    data = table.data.copy()
    for name in data.columns:
        # Arrow has one type a column.
        if data[name].dtype == object:
            data[name] = [None if value is None else str(value) for value in data[name]]
    buffer = io.BytesIO()
    data.to_parquet(buffer, index=False)
    return buffer.getvalue()


def csv_text(table: pd.DataFrame) -> str:
    """A table as CSV whose cells are values, also in a spreadsheet.

    Returns: Text that a spreadsheet would take for a formula has an apostrophe before it, as is customary; numbers,
    negative ones too, are unchanged.
    """
    safe = table.rename(columns=_no_formula)
    # Numbers are left as they are: a large matrix has a million of them.
    words = safe.select_dtypes(exclude="number").columns
    safe[words] = safe[words].map(_no_formula)
    return safe.to_csv(index=False, lineterminator="\n")


def _no_formula(value: Any) -> Any:
    """A value whose text begins with no sign that starts a formula in a spreadsheet."""
    if not isinstance(value, str):
        return value
    shown = visible(value, lines=True)
    return f"'{shown}" if shown.lstrip()[:1] in _FORMULA_SIGNS else shown


MOST_ROWS, MOST_COLUMNS = 40, 11
"""That a page holds at a size that is read; the CSV has all."""

FEW_RUNS, MANY_COLUMNS = 6, 9
"""A table of so few rows and so many columns is turned: the columns of one run below each other."""

_BASELINE = re.compile(r" \(baseline [^)]*\)")
_NUMBER = re.compile(r"[−-]?\d")


def to_latex(table: Table, cites: Mapping[str, str], venue: Venue = VENUES["plain"]) -> str:
    """A table as a float; needs the packages amsmath, array, booktabs and graphicx."""
    keys = keys_of(cites.get(metric, "") for metric in table.metrics)
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
    headings = [tex(name) for name in names]
    shape = "".join(_shape(table, name) for name in names)
    if is_turned:
        headings, frame = [headings[0], *frame[0]], pd.DataFrame([headings[1:], *frame.to_numpy()[:, 1:]]).T
        shape = "l" + "r" * len(shown)
    # Headings apart from the labels of columns: two runs, or a run and a heading, may have one name.
    style = frame.style.hide(axis="index").format_index(lambda column: headings[int(str(column))], axis=1)
    body = style.to_latex(column_format=f"@{{}}{shape}@{{}}", hrules=True)
    left_out = f"{len(shown)} of {rows} rows, {len(names)} of {columns} columns; the CSV has all."
    notes = [*table.notes, *([left_out] if shown.shape != table.printed.shape else [])]
    environment = "table*" if venue.two_columns else "table"
    # A table that is too wide is set smaller: nothing leaves the page.
    return "\n".join(
        [
            CITEP,
            rf"\begin{{{environment}}}[tbp]",
            rf"\centering\caption{{{tex(table.caption)}{f'~{cite(keys)}' if keys else ''}}}",
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
    cells = [cell for cell in map(str, table.printed[name]) if cell != UNDEFINED]
    return "r" if cells and name not in table.cited and all(map(_NUMBER.match, cells)) else "l"


def _cell(table: Table, name: str, text: str) -> Latex:
    # "depthscope's default" is no key: it is printed as text.
    keys = keys_of([text]) if name in table.cited else []
    return cite(keys) if keys else tex(text)
