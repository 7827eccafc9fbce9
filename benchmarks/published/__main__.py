"""Which published numbers does depthscope reproduce? ``python -m benchmarks.published``.

Numpy alone; nothing is trained. Each table names its source; a row that misses its tolerance is marked, and the exit code is
then 1. A dash: no paper prints it; in brackets: printed for a model whose weights are not public.
"""

from __future__ import annotations

import sys

from benchmarks.published import results
from benchmarks.published.results import Row


def main() -> int:
    """Print every table; 1 where a number misses its tolerance."""
    holds = True
    for result in results.RESULTS:
        rows = list(result())
        print_table(result.__doc__ or "", rows)
        holds = holds and all(row.agrees for row in rows)
    return int(not holds)


def print_table(title: str, rows: list[Row]) -> None:
    """One table as text."""
    print(title.partition("\n")[0])
    width = max(len(row.name) for row in rows)
    print(f"  {'':<{width}} {'printed':>12} {'found':>12}")
    for row in rows:
        mark = "" if row.agrees else f"  MISSED (tolerance {row.tolerance:g})"
        print(f"  {row.name:<{width}} {printed(row):>12} {float(row.found):>12.6g}{mark}")
    print()


def printed(row: Row) -> str:
    """The printed number; in brackets that of another model."""
    if row.printed is not None:
        return f"{row.printed:.6g}"
    return "–" if row.elsewhere is None else f"({row.elsewhere:.6g})"


if __name__ == "__main__":
    sys.exit(main())
