"""What reaches the terminal, and on which channel? Results on stdout, progress and remarks on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

_SEVERITIES = {"FAIL": "bold red", "WARN": "bold yellow", "INFO": "bold blue"}


def say(text: str = "") -> None:
    """Print text for people on stdout; severities are coloured on a terminal.

    Parameters
    ----------
    text : str
        Plain text; square brackets mean nothing.
    """
    if not sys.stdout.isatty():
        sys.stdout.write(text + "\n")
        return
    styled = Text(text)
    for word, look in _SEVERITIES.items():
        styled.highlight_regex(rf"(?m)^{word}\b.*$", look)
    Console(highlight=False).print(styled, soft_wrap=True)


def emit(data: Any) -> None:
    """Print one JSON document on stdout; undefined numbers are null.

    Parameters
    ----------
    data : mapping, sequence or scalar
        What to print; anything that JSON lacks becomes text.
    """
    sys.stdout.write(json.dumps(_jsonable(data), indent=2, ensure_ascii=False, default=str) + "\n")


def _jsonable(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _jsonable(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_jsonable(value) for value in data]
    if hasattr(data, "tolist"):  # numpy scalars and arrays
        return _jsonable(data.tolist())
    return None if isinstance(data, float) and not math.isfinite(data) else data


def remark(text: str) -> None:
    """Say something beside the result, on stderr.

    Parameters
    ----------
    text : str
        One line.
    """
    sys.stderr.write(f"depthscope: {text}\n")


Progress = Callable[[str, int, int], None]


@contextmanager
def working(what: str) -> Iterator[Progress]:
    """A spinner on stderr while something takes time; a plain line where stderr is no terminal.

    Parameters
    ----------
    what : str
        What is going on.

    Yields
    ------
    function
        Call it with (part, number done, number in all) to say how far it is.
    """
    if not sys.stderr.isatty():
        remark(what)
        yield lambda part, done, total: None
        return
    with Console(stderr=True).status(Text(what)) as status:
        yield lambda part, done, total: status.update(Text(f"{what}: {part} {done}/{total}"))


def show_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: framed on a terminal, in aligned columns elsewhere.

    Parameters
    ----------
    columns : sequence of str
        Headings.
    rows : sequence of sequence of str
        Cells.
    """
    if sys.stdout.isatty():
        grid = Grid(box=SIMPLE_HEAD, header_style="bold")
        for column in columns:
            grid.add_column(Text(column), overflow="fold")
        for row in rows:
            grid.add_row(*(Text(cell) for cell in row))
        Console(highlight=False).print(grid)
        return
    lines = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
