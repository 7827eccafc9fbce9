"""How are results written? As tables of a page, with date, machine, versions and command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

Table = tuple[str, list[str], list[list[str]]]
OWN = ("torch", "depthscope", "transformers")  # installed with this package: no peers


def circumstances(module: str, packages: Iterable[str]) -> dict[str, Any]:
    """Commit, day, machine with its load at the end, versions and command of a run.

    ``module``: run by ``python -m``.
    ``packages``: packages whose versions are listed, where they are installed.
    """
    return {
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()} on {platform.machine()}, {os.cpu_count()} cores, one thread used, load "
        f"{os.getloadavg()[0]:.0f}",
        "versions": versions(packages),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
    }


def commit() -> str:
    """The commit that is timed; with "+" where files differ from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        # Peers are optional: the page lists those that were measured.
        except metadata.PackageNotFoundError:
            continue
    return found


def pinned(found: Mapping[str, str]) -> str:
    """The peers in these versions, as arguments of pip install."""
    return " ".join(f"{name}=={version}" for name, version in found.items() if name not in OWN)


def named(found: Mapping[str, str]) -> str:
    """A sentence with every version."""
    return "Versions: " + ", ".join(f"{name} {version}" for name, version in found.items()) + "."


def as_markdown(table: Table, *, level: int = 3) -> str:
    """A table under its title.

    ``table``: title, header and rows.
    ``level``: of the title.
    """
    title, header, rows = table
    lines = [_line(header), _line(["---"] * len(header)), *map(_line, rows)]
    return "\n".join([f"{'#' * level} {title}", "", *lines, ""])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def put_section(path: Path, name: str, text: str) -> None:
    """Write one part of a page that several benchmarks write, and leave the other parts unchanged.

    ``path``: the page; it need not exist.
    ``name``: name of the part, in comments around it; a new part is appended.
    ``text``: its Markdown.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    part = f"{start}{text.rstrip()}\n{end}"
    # A new part, at the end.
    if start not in page:
        path.write_text(f"{page.rstrip()}\n\n{part}".lstrip(), encoding="utf-8")
        return
    before, rest = page.split(start, 1)
    path.write_text(before + part + rest.split(end, 1)[1], encoding="utf-8")
