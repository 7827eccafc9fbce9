"""What does a first visit take, of runs that nobody analysed yet? `python -m tests.app.dashboard.first_visit RUNS`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.app.dashboard.serving import serving_process

FIRST_ANSWER = ".depthscope-board input:not(:disabled)"
"""A row whose run is judged can be marked."""


def seconds(process: int) -> float:
    """Processor time of the server; its analyses are other processes."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def first_visit(page, root: Path) -> dict[str, float]:
    """Processor seconds of the server from the opening of the page on.

    Returns: Until the table is drawn, until the first run is judged, until all are; and the same by the clock.
    """
    with serving_process(root) as (address, process):
        before, began = seconds(process), time.monotonic()
        page.goto(address)
        page.locator(".depthscope-board table").wait_for(timeout=120_000)
        drawn, drawn_clock = seconds(process) - before, time.monotonic() - began
        page.locator(FIRST_ANSWER).first.wait_for(timeout=120_000)
        first, first_clock = seconds(process) - before, time.monotonic() - began
        page.wait_for_function(
            "() => !document.querySelector('.depthscope-board input:disabled')", timeout=600_000
        )
        return {
            "table of waiting runs": drawn,
            "table of waiting runs, by the clock": drawn_clock,
            "first answer": first,
            "first answer, by the clock": first_clock,
            "all runs": seconds(process) - before,
            "all runs, by the clock": time.monotonic() - began,
        }


if __name__ == "__main__":
    from playwright.sync_api import sync_playwright

    from tests.app.dashboard.conftest import FLAGS

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        runs = shutil.copytree(sys.argv[1], Path(folder, "runs"))  # a copy has no analyses in the cache
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for what, taken in first_visit(browser.new_page(), runs).items():
            print(f"{what:36} {taken:6.2f} s")  # noqa: T201
        browser.close()
