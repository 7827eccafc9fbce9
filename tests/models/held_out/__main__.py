"""The held-out exam: ``python -m tests.models.held_out [words of names]``; docstrings say whose style each is."""

from __future__ import annotations

import sys
import warnings
from collections import Counter

from tests.models.held_out import depth, plain, streams, traps  # noqa: F401, they enter themselves
from tests.models.held_out.register import NETS
from tests.models.held_out.score import score


def main() -> None:
    warnings.simplefilter("ignore")
    words = sys.argv[1:] or [""]
    chosen = [net for net in NETS if any(word in f"{net.kind} {net.name}" for word in words)]
    totals: dict[str, Counter[str]] = {}
    for net in chosen:
        word, why = score(net)
        totals.setdefault(net.kind, Counter())[word] += 1
        sys.stdout.write(f"{net.kind} · {net.name}: {word}: {' '.join(why.split())}\n")
        sys.stdout.flush()
    everything = sum(totals.values(), Counter())
    for kind, counted in [*totals.items(), ("all", everything)]:
        counts = ", ".join(f"{word} {count}" for word, count in counted.most_common())
        sys.stdout.write(f"{kind} ({counted.total()}): {counts}\n")


if __name__ == "__main__":
    main()
