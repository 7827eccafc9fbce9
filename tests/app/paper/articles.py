"""Runs with names of every kind, and what is wrong with a sample article."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import xarray as xr

from tests.models.synthetic_run import synthetic_run

MOST_OVERFULL = 5.0
"""Points beyond the margin that nobody sees."""

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
