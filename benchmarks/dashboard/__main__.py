"""How long does a page of the dashboard take? Processor time of every page: ``python -m benchmarks.dashboard``.

Each case is a folder of runs that are made here, and a process of its own with one thread. A page is visited as Streamlit runs
it, without a browser: the first visit analyses the runs, the second finds the analyses in memory, then a control is changed.
A visit in a third process finds the analyses that were kept beside the runs. What a browser adds (loading the page, drawing
by plotly.js) is not in these numbers; ``--wall`` gives wall times too, of a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from benchmarks.dashboard.runs import made_run
from benchmarks.shared import process, tables
from depthscope.app.dashboard import server
from depthscope.app.dashboard.pages import PAGES
from depthscope.app.dashboard.state import run_library
from depthscope.diagnostics import save_run

ENTRY = Path(server.__file__).resolve().parent / "navigation" / "entrypoint.py"

SMALL = {"layers": 12, "streams": 1, "sequences": 4, "tokens": 32, "features": 64}
CASES: dict[str, tuple[str, int, dict[str, int]]] = {
    "small": ("one run of 12 layers, 4 × 32 tokens, width 64", 1, SMALL),
    "60": (
        "one run of 60 layers, 4 × 64 tokens, width 256",
        1,
        {**SMALL, "layers": 60, "tokens": 64, "features": 256},
    ),
    "1000": (
        "one run of 1000 layers × 8 streams, 1 × 8 tokens, width 16",
        1,
        {"layers": 1000, "streams": 8, "sequences": 1, "tokens": 8, "features": 16},
    ),
    "50": ("50 runs of 12 layers, 4 × 32 tokens, width 64", 50, SMALL),
}
"""Name → words, number of runs, sizes."""


def main() -> None:
    """Measure, and print a table for each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--pages", nargs="+", choices=[_name(page.url_path) for page in PAGES])
    parser.add_argument("--wall", action="store_true", help="wall times too: only of a quiet machine")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(visits(**json.loads(arguments.worker))))
        return
    pages = arguments.pages or [_name(page.url_path) for page in PAGES]
    results: dict[str, Any] = {"cases": {}}
    for case in arguments.cases:
        words, count, sizes = CASES[case]
        print(words, file=sys.stderr)
        with TemporaryDirectory(prefix="depthscope-pages-") as folder:
            for number in range(count):
                save_run(made_run(**sizes, seed=number), Path(folder) / f"run{number:02}.zarr")
            task = {"folder": folder, "pages": pages}
            # In turn: the second process finds what the first has kept.
            results["cases"][case] = [process.ask("benchmarks.dashboard", task) for _ in range(2)]
    results |= tables.circumstances("benchmarks.dashboard", ("streamlit", "plotly", "xarray", "numpy"))
    print(json.dumps(results, indent=1) if arguments.json else text(results, wall=arguments.wall))


def visits(folder: str, pages: list[str]) -> dict[str, dict[str, tuple[float, float]]]:
    """Processor and wall seconds of each page by what was done: first visit, second visit, one control changed."""
    run_library.allow([Path(folder)])
    names = [path.stem for path in sorted(Path(folder).glob("*.zarr"))]
    chosen = names if len(names) <= 3 else names[:3]
    # Streamlit, pandas and plotly are imported by the server when it starts, before the first visitor.
    AppTest.from_string("import streamlit as st\nimport plotly.graph_objects\nst.dataframe([1])").run()
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for page in pages:
        test = AppTest.from_file(str(ENTRY), default_timeout=3600)
        test.query_params["runs"] = chosen
        test._page_hash = calc_hash("" if page == "runs" else page)
        found[page] = {"visit": timed(test.run), "again": timed(test.run), "control": timed(_changed(test))}
        if test.exception:
            raise RuntimeError(f"{page}: {test.exception}")
    return found


def _changed(test: AppTest) -> Callable[[], Any]:
    """A run of the page after another choice: relative depth where its charts have that axis, else another depth pinned."""
    if "axis" in test.session_state:
        test.session_state["axis"] = "relative"
    test.query_params["pin"] = "3"
    return test.run


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Processor and wall seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return time.process_time() - cpu, time.perf_counter() - wall


def text(results: dict[str, Any], *, wall: bool) -> str:
    """The tables of all cases."""
    found: list[tables.Table] = []
    for case, (first, second) in results["cases"].items():
        reasons = [str(each["reason"]) for each in (first, second) if "reason" in each]
        if reasons:
            found.append((f"{CASES[case][0]}: {reasons[0]}", ["page"], []))
            continue
        rows = []
        for page, times in first.items():
            every = [times["visit"], second[page]["visit"], times["again"], times["control"]]
            cells = [f"{cpu:.2f}" + (f" ({elapsed:.2f})" if wall else "") for cpu, elapsed in every]
            rows.append([page, *cells])
        title = f"{CASES[case][0]}: processor seconds" + (" (wall)" if wall else "")
        found.append(
            (title, ["page", "first visit", "kept analysis", "second visit", "a control changed"], rows)
        )
    return tables.as_text(found)


def _name(url_path: str) -> str:
    return url_path or "runs"


if __name__ == "__main__":
    main()
