"""Which tests took longer than a second? ``python -m tests.long_tests FILE`` writes the table anew from pytest's output.

The file is what ``pytest -v -n 2 -m "not slow" --durations=0 --durations-min=0.05`` printed. What the table names is among
the slow tests, but for the first case of a test whose cases are short and many; of these a commit draws one in `ONE_IN`.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

TABLE = Path(__file__).with_name("long_tests.txt")
SECONDS = 1.0
ONE_IN = 12


def number_kept() -> dict[str, int]:
    """By the name of a test of the table, how many of its cases are in every run."""
    lines = (line.split() for line in TABLE.read_text().splitlines())
    return {name: int(kept) for name, kept in lines}


def measured(printed: str) -> dict[str, dict[str, float]]:
    """By test and case, the seconds that pytest printed, with what was set up for it."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for seconds, case in re.findall(
        r"^([\d.]+)s (?:call|setup|teardown) +(tests/\S.*)$", printed, re.MULTILINE
    ):
        found[case.partition("[")[0]][case] += float(seconds)
    return found


def write(printed: str) -> None:
    """The table by one more measurement: tests that are in it already are in no normal run, and stay."""
    kept = number_kept() if TABLE.exists() else {}
    for name, cases in measured(printed).items():
        if sum(cases.values()) > SECONDS and name not in kept:
            kept[name] = int(len(cases) > 1 and median(cases.values()) < SECONDS)
    TABLE.write_text("".join(f"{name} {number}\n" for name, number in sorted(kept.items())))


if __name__ == "__main__":
    write(Path(sys.argv[1]).read_text())
