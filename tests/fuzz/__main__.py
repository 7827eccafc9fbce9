"""``python -m tests.fuzz [FIRST [NUMBER]] [--keep FOLDER]``: damaged files by their number; exit code 1 where one fails."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from tests.fuzz.cases import run_cases
from tests.fuzz.outcomes import FAILURES


def main() -> int:
    """Run the cases that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("first", type=int, nargs="?", default=0)
    parser.add_argument("number", type=int, nargs="?", default=100)
    parser.add_argument("--keep", type=Path, help="where the files of failing cases go")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    for seed, outcome, damage, answer in run_cases(
        range(args.first, args.first + args.number), keep=args.keep
    ):
        counts[outcome] += 1
        if outcome in FAILURES:
            sys.stdout.write(f"case {seed}: {outcome}: {damage}\n  {' '.join(answer.split())[:500]}\n")
    sys.stdout.write(f"{dict(counts)}\n")
    return int(any(counts[outcome] for outcome in FAILURES))


if __name__ == "__main__":
    sys.exit(main())
