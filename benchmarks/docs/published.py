"""Which published numbers does this code reproduce? Tables for the page of methods, from benchmarks.published."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from benchmarks.published.results import RESULTS
from depthscope.app.text.numbers import number

NOTHING = 1e-9
"""The rounding error of a zero differs from machine to machine: below this it is not printed."""
INTEGER = 1e-6
"""Numbers nearer than this to an integer are printed as one."""

_WORDS = """\
Numbers that papers print, or that closed forms give, and those that this code computes, as
`python -m benchmarks.published` does. Nothing is trained. A number that misses its tolerance fails the tests.
A dash: no paper prints it. In brackets: a paper prints it for a model whose weights are not public, and what is found
is the same curve of the network that the table names. `--runs FOLDER` adds these curves of the models that
`depthscope study` trained.
"""


@cache
def published_results() -> str:
    """A table of each published result: the printed number, and the one found here.

    Returns
    -------
    str
        Markdown.
    """
    tables = [_table(result.__doc__ or "", list(result())) for result in RESULTS]
    return "\n".join([_WORDS, *tables])


def _table(title: str, rows: Sequence[Any]) -> str:
    head = f"### {title.partition(chr(10))[0].rstrip('.')}\n\n| | printed | found |\n|---|---:|---:|"
    # A bar in a name would end the cell.
    names = [row.name.replace("|", "\\|") for row in rows]
    lines = (
        f"| {name} | {_printed(row)} | {_digits(row.found)} |" for name, row in zip(names, rows, strict=True)
    )
    return "\n".join([head, *lines]) + "\n"


def _printed(row: Any) -> str:
    if row.printed is not None:
        return _short(row.printed)
    return "–" if row.elsewhere is None else f"({_short(row.elsewhere)})"


def _short(value: float) -> str:
    return f"{float(value):.0f}" if float(value).is_integer() else f"{float(value):.3g}"


def _digits(value: float) -> str:
    """Three digits, or all digits of an integer; a zero with a rounding error is printed as below `NOTHING`."""
    value = float(value)
    if value != 0 and abs(value) < NOTHING:
        return f"below {number(NOTHING)}"
    return f"{value:.0f}" if abs(value - round(value)) < INTEGER else number(value)
