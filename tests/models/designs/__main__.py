"""Print what every design is today: ``python -m tests.models.designs [words of names]``."""

from __future__ import annotations

import sys

from tests.models.designs.catalogue import DESIGNS
from tests.models.designs.outcome import outcome


def main() -> None:
    words = sys.argv[1:]
    for design in DESIGNS:
        if not words or any(word in design.name for word in words):
            sys.stdout.write(f"{design.name}: {outcome(design)}\n")


if __name__ == "__main__":
    main()
