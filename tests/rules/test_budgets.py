"""How large may the house be? Lines of each room and of all, files, pages: ``python -m tests.rules.test_budgets`` prints them.

The gates are what this round reached; the goals of rooms are a report until a round meets them. A new capability names the
user's thread that asks for it and the lines that it takes from its room.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Goal in lines of what each room holds; rooms that are joined in the goal are named together.
ROOMS = {
    ("probes/reading", "probes/structure", "probes/connections"): 7500,
    ("probes/session",): 2500,
    ("probes/model",): 1200,
    ("probes/run",): 1700,
    ("probes/statistics",): 1300,
    ("probes/training",): 2600,
    ("probes/checkpoints", "probes/static"): 2400,
    (
        "probes/interventions",
        "probes/jacobian",
        "probes/lens",
        "probes/settling.py",
        "probes/repairs.py",
    ): 3000,
    ("diagnostics/schema",): 2200,
    ("diagnostics/kernels",): 3800,
    ("diagnostics/quantities",): 1600,
    ("diagnostics/metrics",): 2600,
    ("diagnostics/analysis",): 900,
    ("diagnostics/verdicts", "diagnostics/experiments"): 2900,
    ("app/figures",): 3200,
    ("app/drawing",): 1700,
    ("app/dashboard", "app/readings"): 5000,
    ("app/tables",): 900,
    ("app/paper", "app/report"): 1600,
    ("app/cli",): 1800,
    ("app/text",): 1400,
    ("app/demo",): 700,
}
SOURCE = ("probes", "diagnostics", "app", "depthscope")
# What may not be exceeded from here on: (what, limit, goal of the next round).
GATES = {
    "lines of source": (57_473, 60_000),
    "files of source": (307, 320),
    "lines of tests": (35_996, 36_000),
    "lines of benchmarks": (3_499, 3_500),
    "pages of docs": (30, 30),
    "words of docs": (27_300, 40_000),
}


def tracked(*folders: str, ending: str = ".py") -> Iterator[Path]:
    """The files of some folders, as git has them."""
    listed = subprocess.run(
        ["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    if not listed:
        pytest.skip("not a checkout")
    yield from (path for name in listed if name.endswith(ending) and (path := ROOT / name).is_file())


def lines(*folders: str) -> int:
    """Lines of Python in some folders."""
    return sum(path.read_text(encoding="utf-8").count("\n") for path in tracked(*folders))


def sizes() -> dict[str, int]:
    """What each gate measures."""
    pages = list(tracked("docs", ending=".md"))
    return {
        "lines of source": lines(*SOURCE),
        "files of source": len(list(tracked(*SOURCE))),
        "lines of tests": lines("tests"),
        "lines of benchmarks": lines("benchmarks"),
        "pages of docs": len(pages),
        "words of docs": sum(len(page.read_text(encoding="utf-8").split()) for page in pages),
    }


@pytest.mark.parametrize("what", GATES)
def test_the_house_is_not_larger_than_this_round_left_it(what):
    size, (limit, _) = sizes()[what], GATES[what]
    assert size <= limit, f"{size} {what}, at most {limit}: take out what it takes in"


def test_every_room_has_a_goal():
    named = {part for rooms in ROOMS for part in rooms}
    rooms = {
        f"{package}/{folder.name}"
        for package in ("probes", "diagnostics", "app")
        for folder in (ROOT / package).iterdir()
        if (folder / "__init__.py").exists()
    }
    assert rooms <= named


def main() -> None:
    """Print what there is, and the goals."""
    for what, size in sizes().items():
        limit, goal = GATES[what]
        sys.stdout.write(f"{what:24} {size:7}  gate {limit}, goal {goal}\n")
    for rooms, goal in ROOMS.items():
        size = lines(*rooms)
        mark = "" if size <= goal else f"  over by {size - goal}"
        sys.stdout.write(f"{' '.join(rooms):60} {size:6}  goal {goal}{mark}\n")


if __name__ == "__main__":
    main()
