"""What is every design today? ``python -m tests.models.designs [words of names]``"""

from __future__ import annotations

import sys

from tests.models.designs.catalogue import DESIGNS
from tests.models.designs.outcome import advised, all_outcomes


def main() -> None:
    words = sys.argv[1:]
    for design in DESIGNS:
        if words and not any(word in design.name for word in words):
            continue
        first, second, third = all_outcomes(design)
        sys.stdout.write(f"- {design.name}: {str(first)[:300]}\n")
        if second:
            sys.stdout.write(f"  - after {advised(first)}: {str(second)[:200]}\n")
        if third:
            sys.stdout.write(f"  - with {design.answers()}: {str(third)[:200]}\n")


if __name__ == "__main__":
    main()
