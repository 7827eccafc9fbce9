"""The sample article of every venue, compiled: `python -m tests.app.paper.articles` tries the whole grid, in minutes."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import xarray as xr

from depthscope.app.paper.export import write_bundle
from depthscope.app.text.venues import VENUES
from tests.models.synthetic_run import synthetic_run

ENGINES = ("pdflatex", "lualatex")
MOST_OVERFULL = 5.0
"""Points beyond the margin that nobody sees."""

WRONG = (
    *("Missing character", "Float(s) lost", "Float too large", "undefined references", "multiply defined"),
    "LaTeX Warning: Citation",
)
NAMES = (
    "plain",
    "m_1 50% #2 {x} $y$",
    "модель с очень длинным именем",
    "模型一号",
    "emoji 🔭🙂 run",
    "שלום עולם",
    "نموذج",
    "long-" + "abcdefghij" * 15,
    "words " * 24,
    "Ångström ộ ß łódź",
    "a/b/c\\d~e^f",
    "<i>&amp;</i>",
    "‮reversed",
    "last",
)


def runs_of(count: int) -> dict[str, xr.DataTree]:
    """So many runs with names in many alphabets, plain, HC and mHC in turn."""
    families = ("mhc", "residual", "hc")
    names = NAMES if count > 2 else NAMES[2:4]
    return {
        name: synthetic_run(families[place % 3], layers=2 + place % 2, samples=3, seed=place)
        for place, name in enumerate(names[:count])
    }


def problems_of(folder: Path, engine: str) -> list[str]:
    """What is wrong with the article of a bundle, compiled in a copy of its folder; empty for nothing."""
    command = [engine, "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    for step in (command, ["bibtex", "main"], command, command):
        done = subprocess.run(step, cwd=folder, capture_output=True, timeout=300, check=False)
        if done.returncode != 0:
            return [f"{step[0]} fails: {done.stdout.decode(errors='replace')[-1500:]}"]
    log = (folder / "main.log").read_text(errors="replace").replace("\n", "")
    overfull = [float(points) for points in re.findall(r"Overfull \\[hv]box \(([\d.]+)pt", log)]
    found = [f"{points} pt too wide or high" for points in overfull if points > MOST_OVERFULL]
    for words in (
        "Missing character",
        "Float(s) lost",
        "undefined references",
        "Citation",
        "multiply defined",
        "Float too large",
    ):
        if words in log:
            found.append(f"{words}: {log[log.index(words) : log.index(words) + 200]}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venues", nargs="+", default=list(VENUES))
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 14])
    parser.add_argument("--keep", type=Path, help="folder for the PDFs")
    args = parser.parse_args(arguments)
    failed = 0
    for count in args.counts:
        runs = runs_of(count)
        for venue in args.venues:
            with tempfile.TemporaryDirectory() as scratch:
                start = time.process_time()
                bundle = write_bundle(runs, Path(scratch) / "bundle", venue=venue, formats=("pdf",))
                drawn = time.process_time() - start
                for engine in ENGINES:
                    place = shutil.copytree(bundle, Path(scratch) / engine)
                    found = problems_of(place, engine)
                    failed += bool(found)
                    if args.keep and (place / "main.pdf").exists():
                        args.keep.mkdir(exist_ok=True)
                        shutil.copy(place / "main.pdf", args.keep / f"{venue}-{count}-{engine}.pdf")
                    print(venue, count, engine, f"{drawn:.0f} s drawn", found or "fine", flush=True)  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
