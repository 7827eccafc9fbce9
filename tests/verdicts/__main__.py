"""The command ``python -m tests.verdicts``: draws a zoo, judges it, and prints what is found and what is blamed."""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter

import torch

from tests.verdicts.drawing import Case, cases, run_case
from tests.verdicts.scoring import HARMFUL, HARMLESS, HEALTHY, LOUD


def main() -> int:
    """Score what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.verdicts", description=__doc__)
    parser.add_argument(
        "words", nargs="*", help="only mechanisms and kinds with one of these words in their title"
    )
    parser.add_argument(
        "--draw", type=int, metavar="SEED", help="of the zoo (default: a new one, which is printed)"
    )
    parser.add_argument(
        "--cases", type=int, default=240, metavar="N", help="half faulty, half healthy (default 240)"
    )
    parser.add_argument(
        "--case", type=int, metavar="SEED", help="run the networks of the words again by their own seed"
    )
    parser.add_argument(
        "--all", action="store_true", help="print every network, not only those that went wrong"
    )
    args = parser.parse_args()
    draw = random.SystemRandom().randrange(10**6) if args.draw is None else args.draw
    torch.set_num_threads(1)
    sys.stdout.write(f"draw {draw}, {args.cases} networks\n")
    outcomes = []
    for case in _chosen(args, draw):
        outcomes.append(run_case(case))
        if args.all or not outcomes[-1].is_right:
            sys.stdout.write(f"{outcomes[-1].line}\n")
            sys.stdout.flush()
    spent = sum(outcome.seconds for outcome in outcomes)
    for group in (HARMFUL, HARMLESS, HEALTHY):
        of_group = [each for each in outcomes if each.group == group]
        counts = Counter(each.outcome for each in of_group)
        words = ", ".join(f"{count} {word}" for word, count in counts.most_common())
        loud = [each for each in of_group if each.outcome == LOUD]
        place = (
            f"; place right in {sum(each.placed for each in loud)} of {len(loud)}" if group == HARMFUL else ""
        )
        sys.stdout.write(f"{len(of_group)} {group}: {words}{place}\n")
    sys.stdout.write(f"{spent:.0f} s of one core\n")
    return 0


def _chosen(args: argparse.Namespace, draw: int) -> list[Case]:
    def wanted(title: str) -> bool:
        return not args.words or any(word in title for word in args.words)

    if args.case is not None:
        every = {case.what.title: case.what for case in cases(draw, 1000)}
        return [Case(what, args.case) for title, what in every.items() if wanted(title)]
    return [case for case in cases(draw, args.cases) if wanted(case.what.title)]


if __name__ == "__main__":
    sys.exit(main())
