"""What reaches the terminal, and on which channel? Results on stdout, progress and remarks on stderr.

rich is imported where it is used: every command imports this module, and ``depthscope --help`` must not wait for it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from depthscope.app.text.visible import visible

SEVERITY_STYLES = {"FAIL": "bold red", "WARN": "bold yellow", "INFO": "bold blue"}
"""rich's style of a line that begins with a severity."""

Progress = Callable[[str, int, int], None]
"""Takes the part that is being computed, the number done and the number in all."""


def say(text: str = "") -> None:
    """Print text for people on stdout; severities are coloured on a terminal.

    Parameters
    ----------
    text : str
        Plain text; rich's markup in square brackets is printed as it is.
    """
    text = visible(text, lines=True)
    if not sys.stdout.isatty():
        sys.stdout.write(text + "\n")
        return
    from rich.console import Console
    from rich.text import Text

    styled = Text(text)
    for severity, style in SEVERITY_STYLES.items():
        styled.highlight_regex(rf"(?m)^{severity}\b.*$", style)
    # soft_wrap: text is wrapped by its author, and a path that rich breaks cannot be copied.
    Console(highlight=False).print(styled, soft_wrap=True)


def emit(data: Any) -> None:
    """Print one JSON document on stdout; undefined numbers are null.

    Parameters
    ----------
    data : mapping, sequence or scalar
        What to print; anything that JSON lacks becomes text.
    """
    # json.dumps writes NaN and Infinity as bare words, which are no JSON and which jq and JavaScript refuse.
    sys.stdout.write(json.dumps(_jsonable(data), indent=2, ensure_ascii=False, default=str) + "\n")


def _jsonable(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _jsonable(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_jsonable(value) for value in data]
    # By the method, not by the type: so numpy need not be imported here.
    if hasattr(data, "tolist"):  # numpy scalars and arrays
        return _jsonable(data.tolist())
    return None if isinstance(data, float) and not math.isfinite(data) else data


def remark(text: str) -> None:
    """Print a remark about the result, on stderr.

    Parameters
    ----------
    text : str
        One line.
    """
    sys.stderr.write(f"depthscope: {visible(text, lines=True)}\n")


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
        Call it with (part, number done, number in all) to show how far it is.
    """
    if not sys.stderr.isatty():
        remark(what)
        # In a log a line for every metric would bury the result.
        yield lambda part, done, total: None
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(what)) as status:
        yield lambda part, done, total: status.update(Text(f"{what}: {part} {done}/{total}"))


@contextmanager
def progress_bar(title: str, *, visible: bool | None = None) -> Iterator[Callable[[float, str], None]]:
    """A bar on stderr.

    Parameters
    ----------
    title : str
        What is going on.
    visible : bool, optional
        None shows it where stderr is a terminal: in a file it would be one line for each update.

    Yields
    ------
    function
        Call it with (fraction that is done, what is being done) to move the bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    shown = sys.stderr.isatty() if visible is None else visible
    columns = TextColumn(title), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda fraction, text: bar.update(task, completed=min(fraction, 1.0), description=text)


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
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        grid = Table(box=SIMPLE_HEAD, header_style="bold")
        for column in columns:
            grid.add_column(Text(visible(column)), overflow="fold")
        for row in rows:
            grid.add_row(*(Text(visible(cell)) for cell in row))
        Console(highlight=False).print(grid)
        return
    lines = [[visible(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
