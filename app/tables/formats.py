"""How is a table written to a file? As LaTeX with booktabs rules, as Markdown, as CSV."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from typing import Any

import pandas as pd

from depthscope.app.tables.tables import Table, spoken
from depthscope.app.text.bibliography import keys_of
from depthscope.app.text.latex import Latex, cite, tex
from depthscope.app.text.visible import visible

HEADING_WIDTH = 14  # letters: as wide as "12.3 ± 0.4" with its margins, so that headings do not set the width
_FORMULA_SIGNS = tuple("=+-@＝＋－＠")  # with the wide forms that spreadsheets of East Asia take too
_KEY_IN_BRACKETS = re.compile(r"\((\w+)\)")


def to_latex(table: Table, cites: Mapping[str, str]) -> str:
    """A table float with booktabs rules, never wider than the page.

    Parameters
    ----------
    table : Table
        What to write.
    cites : mapping of str to str
        Bibliography keys by metric.

    Returns
    -------
    str
        Needs the packages amsmath, booktabs and graphicx; ``table*`` spans both columns where there are two.
    """
    from depthscope.app.text.templates import latex_template  # here: Markdown and CSV need no Jinja

    columns = [str(column) for column in table.printed]
    return latex_template("depthscope.app.tables", "table.tex.jinja").render(
        table=table,
        definitions=[
            (spoken(metric), symbol, keys_of([cites.get(metric, "")]))
            for metric, symbol in table.symbols.items()
        ],
        # Sentences wrap in a column of fixed width; "l" would make the table as wide as the longest one.
        shape="".join("p{0.42\\textwidth}" if name in table.wrapped else "l" for name in columns),
        headings=[textwrap.wrap(name, HEADING_WIDTH, break_long_words=False) for name in columns],
        rows=[
            [_cell_lines(table, name, text) for name, text in zip(columns, row, strict=True)]
            for row in table.printed.to_numpy().tolist()
        ],
    )


def _cell_lines(table: Table, column: str, text: str) -> list[str]:
    """The lines of a cell: its citation, its value on top of its null, or its text."""
    # "this project" is no key: it is printed as text.
    keys = keys_of([text]) if column in table.cited else []
    if keys:
        return [cite(keys)]
    if column in table.wrapped:
        return [_with_citations(text)]
    value, bracket, null = text.partition(" (null ")
    return [value, bracket[1:] + null] if table.stacked and bracket else [tex(text)]


def _with_citations(text: str) -> Latex:
    """A sentence whose keys in brackets, "(xie2025mhc)", are citations."""

    def citation(match: re.Match[str]) -> str:
        keys = keys_of([match.group(1)])
        return cite(keys) if keys else match.group(0)

    return Latex(_KEY_IN_BRACKETS.sub(citation, tex(text)))


def to_markdown(table: Table) -> str:
    """A table in Markdown, its caption above.

    Parameters
    ----------
    table : Table
        What to write.

    Returns
    -------
    str
    """
    columns = [str(column) for column in table.printed.columns]
    rows = [columns, ["---"] * len(columns), *table.printed.map(visible).to_numpy().tolist()]
    lines = [
        "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in row) + " |" for row in rows
    ]
    return "\n".join([f"**{table.title}.** {table.caption}", "", *lines]) + "\n"


def to_csv(table: Table) -> str:
    """The numbers of a table at full precision.

    Parameters
    ----------
    table : Table
        What to write.

    Returns
    -------
    str
        Empty cells are undefined.
    """
    return csv_text(table.data)


def csv_text(table: pd.DataFrame) -> str:
    """A table as CSV whose cells are values, also in a spreadsheet.

    Parameters
    ----------
    table : pandas.DataFrame
        Any table.

    Returns
    -------
    str
        Text that a spreadsheet would take for a formula has an apostrophe before it, as is customary; numbers, negative
        ones too, are unchanged.

    Examples
    --------
    >>> print(csv_text(pd.DataFrame({"run": ["=1+1", "a"], "gain": [-0.5, 1.0]})))
    run,gain
    '=1+1,-0.5
    a,1.0
    <BLANKLINE>
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
