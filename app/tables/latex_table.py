"""How is a table set in a paper? Numbers aligned at their points, eight points high, in as many parts as pages need."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from depthscope.app.tables.tables import Table, spoken
from depthscope.app.text.bibliography import keys_of, source_words
from depthscope.app.text.latex import CITEP, Latex, cite, tex
from depthscope.app.text.numbers import UNDEFINED
from depthscope.app.text.venues import VENUES, Venue

HEADING_WIDTH = 14  # letters: as wide as "12.3 ± 0.4" with its margins, so that headings do not set the width
LONGEST_TEXT = 24  # letters of a cell of words, above which its column wraps
_SIZE, _LINE = 8.0, 9.6  # points
# An upper estimate of the width of a letter, so that columns that fit by it do fit. Measured: figures of Latin Modern are
# 4.25 points wide at this size, words 3.9 in the mean.
_LETTER = 4.3
_GAP = 8.0  # points between columns: twice \tabcolsep
_KEY_IN_BRACKETS = re.compile(r"\((\w+)\)")
# What `quantity` prints, with the place of an extreme after it.
_WITH_NULL = re.compile(r"^(.*?) \(baseline ([^)]*)\)( @\d+)?$")
_NUMBER = re.compile(r"^(−?\d+)(\.\d+)?(?:e(-?\d+))?( .*)?$")


@dataclass(frozen=True)
class _Column:
    """One column: its heading in lines, its cells, and how wide they are."""

    name: str
    heading: tuple[str, ...]
    cells: tuple[str, ...]
    null: str
    kind: str
    width: float

    @property
    def shape(self) -> str:
        if self.kind == "number":
            return "r@{}l"
        return rf">{{\raggedright\arraybackslash}}p{{{self.width:.0f}pt}}" if self.kind == "words" else "l"


def to_latex(table: Table, cites: Mapping[str, str], venue: Venue = VENUES["plain"]) -> str:
    """A table as floats with booktabs rules: columns and rows that do not fit onto a page go to further parts.

    Returns: Needs the packages amsmath, array, booktabs and graphicx.
    """
    from depthscope.app.text.templates import latex_template  # here: Markdown and CSV need no Jinja

    columns = _columns(table, venue)
    rows = len(table.printed)
    parts = [
        (group, chunk)
        for chunk in _chunks(table, columns, venue, rows)
        for group in _groups(table, columns, venue)
    ]
    return latex_template("depthscope.app.tables", "table.tex.jinja").render(
        table=table,
        citep=CITEP,
        environment="table*" if venue.two_columns else "table",
        definitions=[
            (spoken(metric), symbol, keys_of([cites.get(metric, "")]))
            for metric, symbol in table.symbols.items()
        ],
        parts=[_part(table, group, chunk, last=chunk[-1:] == [rows - 1]) for group, chunk in parts],
    )


def _columns(table: Table, venue: Venue) -> list[_Column]:
    across = venue.text * 72.27
    columns = []
    for name in map(str, table.printed.columns):
        cells = tuple(map(str, table.printed[name].tolist()))
        cells, null = _without_shared_null(cells) if not table.stacked else (cells, "")
        values = [_parted(cell)[0] for cell in cells]
        is_number = name not in (*table.wrapped, *table.cited) and all(
            cell == UNDEFINED or _NUMBER.match(cell) for cell in values
        )
        heading = tuple(textwrap.wrap(name, HEADING_WIDTH)) or ("",)
        shown = [_as_cited(cell, venue) for cell in cells] if name in table.cited else values
        longest = max((len(cell) for cell in shown), default=0)
        widest = max(map(len, heading))
        if is_number and any(cell != UNDEFINED for cell in values):
            # A null in the cell takes its room.
            inside = (
                0.0
                if table.stacked
                else max(
                    len(_parted(cell)[1]) + len(" (baseline )") * bool(_parted(cell)[1]) for cell in cells
                )
            )
            kind, width = "number", max(_number_width([*values, null]) + inside * _LETTER, widest * _LETTER)
        elif name in table.wrapped or longest > LONGEST_TEXT:
            # Sentences and long names wrap; "l" would make the table as wide as the longest one.
            share = 0.6 if name in table.wrapped else 0.24
            kind, width = "words", share * across
        else:
            kind, width = "text", max(longest, widest) * _LETTER
        columns.append(_Column(name, heading, cells, null, kind, width))
    return columns


def _as_cited(cell: str, venue: Venue) -> str:
    """About what a bibliography style prints for a source."""
    if not keys_of([cell]):
        return cell
    return f"({source_words(cell)})" if venue.author_year else "[12]"


def _without_shared_null(cells: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Cells without a null that all of them have, and that null, which then has a row of its own."""
    parted = [_parted(cell) for cell in cells]
    nulls = {null for value, null in parted if value != UNDEFINED}
    if len(nulls) != 1 or "" in nulls:
        return tuple(cells), ""
    return tuple(value for value, _ in parted), nulls.pop()


def _parted(cell: str) -> tuple[str, str]:
    """A cell without its null, and that null."""
    found = _WITH_NULL.match(cell)
    return (f"{found[1]}{found[3] or ''}", found[2]) if found else (cell, "")


def _number_width(cells: Sequence[str]) -> float:
    """The longest part before the points, and the longest after them."""
    halves = [_halves(cell) for cell in cells]
    return sum(max(len(half[side]) for half in halves) for side in (0, 1)) * _LETTER


def _halves(cell: str) -> tuple[str, str]:
    """What is before the point and what from the point on, as plain text."""
    found = _NUMBER.match(cell)
    if not found:
        return cell, ""
    whole, rest, exponent, after = (part or "" for part in found.groups())
    return whole, rest + (f"·10{exponent}  " if exponent else "") + after


def _groups(table: Table, columns: Sequence[_Column], venue: Venue) -> list[list[_Column]]:
    """Columns that fit across the text together, each time with those that name the row."""
    keys, others = list(columns[: table.keys]), columns[table.keys :]
    room = venue.text * 72.27 - sum(column.width + _GAP for column in keys)
    groups: list[list[_Column]] = [[]]
    for column in others:
        if groups[-1] and sum(each.width + _GAP for each in groups[-1]) + column.width + _GAP > room:
            groups.append([])
        groups[-1].append(column)
    return [[*keys, *group] for group in groups]


def _chunks(table: Table, columns: Sequence[_Column], venue: Venue, rows: int) -> list[list[int]]:
    """Rows that fit onto a page together, under a caption and its notes."""
    words = len(table.caption) + 40 * len(table.symbols)
    above = math.ceil(words * 5.0 / (venue.text * 72.27)) * 13 + len(table.notes) * 20 + 60
    room = max(0.86 * venue.height * 72.27 - above, 12 * _LINE)
    chunks: list[list[int]] = [[]]
    used = 0.0
    for row in range(rows):
        height = _LINE * _lines_of(columns, row, stacked=table.stacked)
        if chunks[-1] and used + height > room:
            chunks.append([])
            used = 0.0
        chunks[-1].append(row)
        used += height
    return chunks


def _lines_of(columns: Sequence[_Column], row: int, *, stacked: bool) -> int:
    wrapped = [
        math.ceil(len(column.cells[row]) * _LETTER * 1.1 / column.width)
        for column in columns
        if column.kind == "words"
    ]
    return max([1, *wrapped]) + stacked


def _part(table: Table, columns: Sequence[_Column], rows: Sequence[int], *, last: bool) -> dict[str, object]:
    """What the template needs of one part: its shape, headings and rows of code."""
    lines: list[str] = []
    for row in rows:
        bold = {name for place, name in table.best if place == row}
        lines.append(
            " & ".join(_cell(table, column, column.cells[row], column.name in bold) for column in columns)
        )
        if table.stacked:
            nulls = [_parted(column.cells[row])[1] for column in columns]
            if any(nulls):
                lines.append(_null_row(columns, nulls))
    shared = [column.null for column in columns]
    return {
        "shape": "".join(column.shape for column in columns),
        "headings": " & ".join(map(_heading, columns)),
        "rows": lines,
        "null": _null_row(columns, shared) if last and any(shared) else "",
    }


def _null_row(columns: Sequence[_Column], nulls: Sequence[str]) -> str:
    cells = [
        _numeric(null) if column.kind == "number" else tex(null)
        for column, null in zip(columns, nulls, strict=True)
    ]
    return " & ".join([r"\textit{baseline}", *cells[1:]])


def _heading(column: _Column) -> str:
    lines = [tex(line) for line in column.heading]
    inner = r"\\".join(lines)
    text = inner if len(lines) == 1 else rf"\begin{{tabular}}[b]{{@{{}}l@{{}}}}{inner}\end{{tabular}}"
    return rf"\multicolumn{{2}}{{l}}{{{text}}}" if column.kind == "number" else text


def _cell(table: Table, column: _Column, text: str, bold: bool) -> str:
    if column.kind == "number":
        value, null = _parted(text)
        return _numeric(value, bold=bold, after=f" (baseline {null})" if null and not table.stacked else "")
    # "this project" is no key: it is printed as text.
    keys = keys_of([text]) if column.name in table.cited else []
    if keys:
        return cite(keys)
    code = _with_citations(text) if column.name in table.wrapped else tex(text)
    return rf"\textbf{{{code}}}" if bold else code


def _numeric(text: str, *, bold: bool = False, after: str = "") -> str:
    r"""A number as two cells that meet at its point."""
    found = _NUMBER.match(text)
    if not found:
        return f"{tex(text)} & {tex(after)}"
    whole, rest, exponent, more = (part or "" for part in found.groups())
    power = rf"$\times10^{{{exponent}}}$" if exponent else ""
    # A space at the begin of a cell is none to LaTeX.
    tie = "~" if more and not rest + power else ""
    left, right = tex(whole), f"{rest}{power}{tie}{tex(more.lstrip() if tie else more)}"
    if bold:
        left, right = Latex(rf"\textbf{{{left}}}"), rf"\textbf{{{right}}}" if right else ""
    return f"{left} & {right}{tex(after)}"


def _with_citations(text: str) -> Latex:
    """A sentence whose keys in brackets, "(xie2025mhc)", are citations."""
    # The keys before anything is escaped or broken.
    pieces, start = [], 0
    for found in _KEY_IN_BRACKETS.finditer(text):
        keys = keys_of([found.group(1)])
        if keys:
            pieces += [tex(text[start : found.start()]), cite(keys)]
            start = found.end()
    return Latex("".join([*pieces, tex(text[start:])]))
