"""Which published numbers does this code find? Tables for the methods page, from benchmarks/published.py."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from app.quantity import number

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "published.py"
NOTHING = 1e-9
"""What rounding leaves of a zero differs from machine to machine: below this it is not printed."""
WHOLE = 1e-6

_WORDS = """\
Numbers that papers print, or that closed forms give, beside those that this code computes, as
`python benchmarks/published.py` does. Nothing is trained. A number that misses its tolerance fails the tests.
A dash: no paper prints it. In brackets: a paper prints it for a model whose weights are not public, and what is found
is the same curve of the network that the table names. `--runs FOLDER` adds these curves of the models that
`depthscope study` trained.
"""


@cache
def published_results() -> str:
    """A table of each published result: what is printed, what is found here.

    Returns
    -------
    str
        Markdown.

    Raises
    ------
    ValueError
        Outside a checkout, which has the script.
    """
    if not SCRIPT.exists():
        raise ValueError(f"no {SCRIPT.name} beside the package; write the methods page in a checkout")
    tables = [_table(result.__doc__ or "", list(result())) for result in _script().RESULTS]
    return "\n".join([_WORDS, *tables])


def _script() -> ModuleType:
    """The script as a module; its dataclasses look it up under its name."""
    specification = importlib.util.spec_from_file_location("published_results", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = sys.modules["published_results"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _table(title: str, rows: Sequence[Any]) -> str:
    head = f"### {title.partition(chr(10))[0].rstrip('.')}\n\n| | printed | found |\n|---|---:|---:|"
    lines = (f"| {_cell(row.name)} | {_printed(row)} | {_digits(row.found)} |" for row in rows)
    return "\n".join([head, *lines]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _printed(row: Any) -> str:
    if row.printed is not None:
        return _short(row.printed)
    return "–" if row.elsewhere is None else f"({_short(row.elsewhere)})"


def _short(value: float) -> str:
    return f"{float(value):.0f}" if float(value).is_integer() else f"{float(value):.3g}"


def _digits(value: float) -> str:
    """Three digits, or all of a whole number; what rounding leaves of zero is said to be below it."""
    value = float(value)
    if value != 0 and abs(value) < NOTHING:
        return f"below {number(NOTHING)}"
    return f"{value:.0f}" if abs(value - round(value)) < WHOLE else number(value)
