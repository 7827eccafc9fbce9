"""Which published numbers does depthscope reproduce? ``python -m benchmarks.published``.

Numpy alone; nothing is trained. Each table names its source; a row that misses its tolerance is marked, and the exit code is
then 1. A dash: no paper prints it; in brackets: printed for a model whose weights are not public, of which only the curve can
be shown. ``--runs`` adds the same curves of trained models.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.published import dense_connections, results, trained_models
from benchmarks.published.row import Row


def main(arguments: list[str] | None = None) -> int:
    """Print every table; 1 where a number misses its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one object, by result, as JSON")
    parser.add_argument(
        "--runs", type=Path, help="folder of depthscope study: the same curves of trained models"
    )
    options = parser.parse_args(arguments)
    tables: dict[Any, list[Row]] = {}
    pictures: dict[Any, Any] = {dense_connections.dense_connections: dense_connections.drawn}
    if options.runs:
        try:
            tables |= {
                result: list(result(options.runs))
                for result in (trained_models.gains, trained_models.cosines)
            }
        except ValueError as error:
            parser.error(str(error))
        pictures[trained_models.cosines] = partial(trained_models.drawn, options.runs)
    # Last, since they take longest: a wrong --runs is refused before. Their tables come first in the output.
    tables = {result: list(result()) for result in results.RESULTS} | tables
    if options.json:
        print(
            json.dumps({name_of(result): list(map(plain, rows)) for result, rows in tables.items()}, indent=2)
        )
    else:
        for result, rows in tables.items():
            print_table(result.__doc__, rows)
            if result in pictures:
                print(pictures[result](), end="\n\n")
    # Rows without a printed number always agree.
    return int(not all(row.agrees for rows in tables.values() for row in rows))


def name_of(result: Any) -> str:
    """Name of a result in JSON, with a prefix for trained models."""
    return f"trained_{result.__name__}" if result.__module__ == trained_models.__name__ else result.__name__


def plain(row: Row) -> dict[str, Any]:
    """One row in JSON."""
    numbers = {"printed": row.printed, "printed_of_another_model": row.elsewhere, "found": row.found}
    values = {name: None if value is None else float(value) for name, value in numbers.items()}
    return {"name": row.name, **values, "holds": row.agrees}


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
