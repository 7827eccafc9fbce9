"""What reaches the terminal, and on which channel? Results on stdout, progress and remarks on stderr.

Names, attributes and errors come from files of others, and may contain what moves the cursor, hides text or adds a line:
everything that is printed goes through `printable` here.

rich is imported where it is used: every command imports this module, and ``depthscope --help`` must not wait for it.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from depthscope.app.text.visible import visible

SEVERITY_STYLES = {"FAIL": "bold red", "WARN": "bold yellow", "INFO": "bold blue"}
"""rich's style of a line that begins with a severity."""

LEAST_COLUMNS = 40
"""A narrower terminal wraps by itself: below, a card has more lines than anybody reads."""

ASCII = dict(zip("▁▂▃▄▅▆▇█·–—−×…└σπλαβγκχρτΔ√≤≥≈→°±²³₁₂‖’‘“”«»", (
    "_", ",", "-", "~", "=", "+", "*", "#", ".", "-", "-", "-", "x", "...", "`-", "sigma", "pi", "lambda", "alpha", "beta",
    "gamma", "kappa", "chi", "rho", "tau", "Delta", "sqrt", "<=", ">=", "~", "->", " deg", "+-", "^2", "^3", "_1", "_2", "|",
    "'", "'", '"', '"', '"', '"',
), strict=True))  # fmt: skip
"""What is printed for a sign of ours that the encoding of the terminal lacks."""

QUIET_SECONDS = 3.0
"""Seconds of work after which a log gets a line about the progress. A heuristic of ours: a damaged run is refused in less."""

Progress = Callable[[str, int, int], None]
"""Takes the part that is being computed, the number done and the number in all."""


# A message is read by people: the middle of one with a megabyte of somebody's text in it is left out.
MAX_MESSAGE = 1500


def printable(value: object, *, lines: bool = False, longest: int | None = None) -> str:
    r"""A value of somebody else for the terminal: as one line of visible characters, others as their escapes.

    ``lines``: keep line breaks and tabs, of text of our own.
    ``longest``: characters after which the middle is left out.

    Examples
    --------
    >>> printable("a\x1b[2J\nb")
    'a\\x1b[2J\\nb'
    """
    shown = visible(value, lines=lines, longest=longest)
    # Right-to-left words are isolated for a page. Few terminals know the two signs, and most print something for them.
    return shown.replace("\u2068", "").replace("\u2069", "")


def command_line(*words: str | Path) -> str:
    """A command of ours to copy into a shell: a path in it is one word there, whatever its name is.

    Examples
    --------
    >>> command_line("check", Path("a b;c.zarr"))
    "depthscope check 'a b;c.zarr'"
    """
    # A path that begins with a dash would be read as an option.
    plain = [
        f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words
    ]
    return shlex.join(["depthscope", *plain])


def columns(most: int = 100) -> int:
    """How many columns text may take: those of the terminal (or of COLUMNS) up to ``most``; as many where there is none."""
    return max(LEAST_COLUMNS, min(most, shutil.get_terminal_size((most, 24)).columns))


def encodable(text: str) -> str:
    """Text with ASCII for the blocks and signs of ours that the encoding of stdout lacks; others become escapes in print."""
    encoding = sys.stdout.encoding or "utf-8"
    if text.encode(encoding, "ignore").decode(encoding) == text:
        return text
    return "".join(sign if sign.encode(encoding, "ignore") else ASCII.get(sign, sign) for sign in text)


def say(text: str = "") -> None:
    """Print text for people on stdout; severities are coloured on a terminal.

    ``text``: plain text; rich's markup in square brackets is printed as it is. Line feeds stay: a value of somebody
    else goes through `printable` before it becomes part of the text.
    """
    text = encodable(printable(text, lines=True))
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
    """Print one JSON document on stdout; undefined numbers are null, and what JSON lacks becomes text."""
    # json.dumps writes NaN and Infinity as bare words, which are no JSON and which jq and JavaScript refuse.
    # On another encoding than UTF-8 every other character is an escape, which JSON reads as the same character.
    ascii_only = (sys.stdout.encoding or "utf-8").lower().replace("-", "") != "utf8"
    text = json.dumps(_jsonable(data), indent=2, ensure_ascii=ascii_only, default=str)
    sys.stdout.write(re.sub(r"[^\n -~]", _json_escape, text) + "\n")


def _json_escape(character: re.Match[str]) -> str:
    # What a terminal would obey or not show; JSON has an escape for it that means the same.
    return character[0] if character[0].isprintable() else json.dumps(character[0])[1:-1]


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
    """Print a remark about the result, on stderr."""
    sys.stderr.write(f"depthscope: {printable(' '.join(text.split()), longest=MAX_MESSAGE)}\n")


@contextmanager
def working(what: str) -> Iterator[Progress]:
    """A spinner on stderr, or a plain line once it takes time; gives what takes (part, number done, number in all)."""
    if not sys.stderr.isatty():
        # Later, so that bad input, which is refused by then, gets its one line.
        line = threading.Timer(QUIET_SECONDS, remark, [what])
        line.daemon = True  # nothing waits for it at the end
        line.start()
        try:
            # In a log a line for every metric would bury the result.
            yield lambda part, done, total: None
        finally:
            line.cancel()
        return
    from rich.console import Console
    from rich.text import Text

    what = printable(what)
    with Console(stderr=True).status(Text(what)) as status:
        yield lambda part, done, total: status.update(Text(f"{what}: {printable(part)} {done}/{total}"))


def show_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in aligned columns."""
    columns = [printable(column) for column in columns]
    rows = [[printable(cell) for cell in row] for row in rows]
    lines = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
