"""The command ``python -m tests.fuzz``: hours of mutations, a table at the end, exit code 1 where anything failed."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.fuzz import KINDS
from tests.fuzz.campaign import Result, examples, run_cases, table, to_json
from tests.fuzz.outcomes import FAILURES


def main() -> int:
    """Run a campaign as the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help=f"some of {', '.join(KINDS)}; all by default"
    )
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--rounds", type=int, default=None, help="cases for each mutator")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="MUTATOR", help="mutators with this in their name")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the files of failing cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the names of the mutators")
    args = parser.parse_args()
    kinds = [KINDS[name] for name in args.kinds or KINDS]
    if args.list:
        for kind in kinds:
            sys.stdout.writelines(f"{kind.name} {name}\n" for name in kind.mutators)
        return 0
    if args.minutes is None and args.rounds is None:
        args.rounds = 1
    start, done = time.monotonic(), [0, 0]

    def count(result: Result) -> None:
        done[0] += 1
        done[1] += result.outcome in FAILURES
        if result.outcome in FAILURES:  # at once: a campaign of hours may be stopped before its table
            message = " ".join(result.worst.message.split())[:200]
            sys.stderr.write(
                f"{result.outcome}: {result.kind} {result.mutator} --seed {result.seed}: {message}\n"
            )
        if done[0] % 500 == 0:
            sys.stderr.write(f"{done[0]} cases, {done[1]} failures, {time.monotonic() - start:.0f} s\n")

    results = run_cases(
        kinds,
        seconds=None if args.minutes is None else 60 * args.minutes,
        rounds=args.rounds,
        seed=args.seed,
        only=args.only,
        keep=args.keep,
        jobs=args.jobs,
        on_result=count,
    )
    sys.stdout.write(f"{table(results)}\n\n{examples(results)}\n\n{len(results)} cases\n")
    if args.json:
        args.json.write_text(to_json(results))
    return int(any(result.outcome in FAILURES for result in results))


if __name__ == "__main__":
    sys.exit(main())
