"""Train every network that is not in the table yet, then write the page: ``python -m benchmarks.answer --page docs``.

Each network is added to the table when it is measured, so that a run that is ended goes on where it was. ``--page DIR`` alone
writes answer.md and its figures from the table that is there.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.answer.networks import DESIGNS
from benchmarks.answer.page import write_page

SIZE = {"depth": 4, "width": 32, "heads": 2, "streams": 4, "batch": 2, "length": 64}
QUICK = {"depth": 2, "width": 16, "heads": 2, "streams": 4, "batch": 2, "length": 16}
# (steps of training, constant that every branch is multiplied with, seeds)
VARIANTS = ((1000, 1.0, 5), (1000, 0.1, 3), (1000, 0.01, 3), (1000, 0.001, 3), (4000, 1.0, 5))
QUICK_VARIANTS = ((2, 1.0, 2), (2, 0.01, 1), (3, 1.0, 2))


def plan(*, quick: bool) -> Iterator[dict[str, Any]]:
    """The settings of every network, seed by seed: a run that is ended early has all designs of some seeds."""
    for steps, scale, seeds in QUICK_VARIANTS if quick else VARIANTS:
        for seed in range(seeds):
            for family in DESIGNS:
                sizes = QUICK if quick else SIZE
                first = {"family": family, "depth": sizes["depth"], "seed": seed, "steps": steps}
                yield {**first, "branch_scale": scale, **sizes}


def main(words: list[str] | None = None) -> int:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", type=Path, default=Path("docs/answer.csv"))
    parser.add_argument("--page", type=Path, help="write answer.md and its figures into this folder")
    parser.add_argument(
        "--quick", action="store_true", help="tiny networks and two steps: to see that it runs"
    )
    parser.add_argument("--no-training", action="store_true", help="write the page from the table as it is")
    options = parser.parse_args(words)
    if not options.no_training:
        _measure_missing(options.table, quick=options.quick)
    if options.page is not None:
        write_page(options.table, options.page)
    return 0


def _measure_missing(table: Path, *, quick: bool) -> None:
    from benchmarks.answer.measure import measure
    from depthscope.app.demo.training import single_threaded

    networks = list(plan(quick=quick))
    keys = list(networks[0])
    done = set()
    if table.exists():
        with table.open(newline="", encoding="utf-8") as file:
            done = {tuple(row[key] for key in keys) for row in csv.DictReader(file)}
    for settings in networks:
        if tuple(str(settings[key]) for key in keys) in done:
            continue
        with single_threaded():
            found = measure(settings)
        cells = {name: _cell(value) for name, value in {**settings, **found}.items()}
        is_new = not table.exists()
        with table.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(cells), lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(cells)
        sys.stderr.write(
            f"{settings['family']}, seed {settings['seed']}, {settings['steps']} steps: loss {cells['loss']}\n"
        )


def _cell(value: Any) -> str:
    """Five digits: of a mean of a few seeds more are noise. The values of a curve in one cell."""
    if isinstance(value, list):
        return " ".join(f"{each:.5g}" for each in value)
    return str(value) if isinstance(value, (str, int)) else f"{value:.5g}"


if __name__ == "__main__":
    sys.exit(main())
