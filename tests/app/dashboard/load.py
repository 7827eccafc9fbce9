"""How much memory do reloads and open pages take? `python -m tests.app.dashboard.load FOLDER --reloads 500 --pages 200`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from depthscope.app.dashboard.pages import PAGES
from tests.app.dashboard.serving import serving_process
from tests.app.dashboard.visitor import Visitor, open_files, resident_bytes


@dataclass(frozen=True)
class Memory:
    """Resident bytes of the server: after each page was opened once, after the reloads, with all pages open, and after they
    were closed; files of runs that it has open in the end."""

    warm: int
    after_reloads: int
    with_pages: int
    closed: int
    open_files: int


def measured(
    root: Path,
    *,
    reloads: int,
    pages: int,
    wait: float = 0.0,
    report: Callable[[str, int], object] = lambda what, size: None,
) -> Memory:
    """Serve a folder, reload its pages one after another, then keep many open at once.

    Parameters
    ----------
    root : Path
        Folder of runs.
    reloads, pages : int
        How many.
    wait : float
        Seconds after which closed pages are looked at.
    report : callable
        Called with what was measured, and bytes.

    Returns
    -------
    Memory
    """
    paths = [page.url_path for page in PAGES]
    with serving_process(root) as (address, process):

        def size(what: str) -> int:
            now = resident_bytes(process)
            report(what, now)
            return now

        visitor = Visitor(address)
        for path in paths:
            visitor.open(path)
        warm = size("warm")
        for number in range(reloads):
            reloaded = Visitor(address)
            reloaded.open(paths[number % len(paths)])
            reloaded.close()
            if number % 50 == 49:
                size(f"{number + 1} reloads")
        after_reloads = size("after the reloads")
        opened = []
        for number in range(pages):
            opened.append(Visitor(address))
            opened[-1].open(paths[number % len(paths)])
            if number % 50 == 49:
                size(f"{number + 1} pages open")
        with_pages = size("with all pages open")
        for each in [*opened, visitor]:
            each.close()
        time.sleep(wait)
        return Memory(warm, after_reloads, with_pages, size("closed"), open_files(process, root))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--reloads", type=int, default=500)
    parser.add_argument("--pages", type=int, default=200)
    asked = parser.parse_args()
    found = measured(
        asked.root.resolve(),
        reloads=asked.reloads,
        pages=asked.pages,
        wait=60,
        report=lambda what, size: print(f"{what:24} {size / 2**20:7.0f} MB", flush=True),  # noqa: T201
    )
    sys.exit(found.open_files)
