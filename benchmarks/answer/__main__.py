"""Train every network that is not in the table yet, then write the page: ``python -m benchmarks.answer --page docs``.

Each network is added to the table when it is measured, so that a run that is ended goes on where it was. ``--no-training``
writes answer.md and its figures from the table that is there.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.answer.networks import DESIGNS
from benchmarks.answer.page import KEYS, write_page

SIZE = {"width": 32, "heads": 2, "streams": 4, "batch": 8, "length": 64}
QUICK = {"width": 16, "heads": 2, "streams": 4, "batch": 2, "length": 16}
# (blocks, constant that every branch is multiplied with, seeds), in the order in which they are trained: what is there
# already is skipped, so that all depths have some seeds before any has all.
NETWORKS = (
    *((depth, 1.0, seeds) for depth, seeds in ((4, 3), (16, 3), (48, 1), (4, 5))),
    *((16, scale, 1) for scale in (0.1, 0.01, 0.001)),
    *((depth, 1.0, seeds) for depth, seeds in ((16, 5), (48, 3))),
)
QUICK_NETWORKS = ((2, 1.0, 2), (4, 1.0, 2), (4, 0.01, 1))
STEPS, RATE_STEPS, QUICK_STEPS = 1000, 300, 5
# The learning rate of a design at a depth is the best of these after RATE_STEPS steps of a seed that is not used again.
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
RATE_SEED = 100


def plan(*, quick: bool) -> Iterator[dict[str, Any]]:
    """The settings of every network but its rate, seed by seed: a run that is ended early has all designs of some seeds."""
    steps, sizes = (QUICK_STEPS, QUICK) if quick else (STEPS, SIZE)
    for depth, scale, seeds in QUICK_NETWORKS if quick else NETWORKS:
        for seed in range(seeds):
            for family in DESIGNS:
                first = {"family": family, "depth": depth, "seed": seed, "steps": steps}
                yield {**first, "branch_scale": scale, **sizes}


def main(words: list[str] | None = None) -> int:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", type=Path, default=Path("docs/answer.csv"))
    parser.add_argument("--page", type=Path, help="write answer.md and its figures into this folder")
    parser.add_argument("--quick", action="store_true", help="tiny networks, few steps: to see that it runs")
    parser.add_argument("--compile", action="store_true", help="compile the blocks (needs a C++ compiler)")
    parser.add_argument("--no-training", action="store_true", help="write the page from the table as it is")
    options = parser.parse_args(words)
    if not options.no_training:
        _measure_missing(options.table, quick=options.quick, compiled=options.compile)
    if options.page is not None:
        write_page(options.table, options.page)
    return 0


def _measure_missing(table: Path, *, quick: bool, compiled: bool) -> None:
    from benchmarks.answer.measure import measure
    from benchmarks.answer.pretrained import pretrained
    from depthscope.app.demo.training import single_threaded

    rates = table.with_name(f"{table.stem}_rates.csv")
    with single_threaded():
        for settings in plan(quick=quick):
            if _row(table, settings, KEYS) is None:
                full = {**settings, "rate": _best_rate(rates, settings, compiled=compiled)}
                states = table.with_name(f"{table.stem}_states")
                _append(table, {**full, **measure(full, states, compiled=compiled)}, KEYS)
        for name, measured in pretrained(quick=quick).items():
            if _row(table, {"family": name}, ("family",)) is None:
                _append(table, measured(), KEYS)


def _best_rate(rates: Path, settings: Mapping[str, Any], *, compiled: bool) -> float:
    """Of `RATES`, with which a short training reaches the least held-out loss; measured once for a design and a depth."""
    from benchmarks.answer.measure import rate_loss

    found = {}
    for rate in RATES:
        steps = min(RATE_STEPS, settings["steps"])
        at = {**settings, "rate": rate, "steps": steps, "seed": RATE_SEED, "branch_scale": 1.0}
        names = ("family", "depth", "rate", "steps")
        row = _row(rates, at, names)
        if row is None:
            row = {name: at[name] for name in names} | {"loss": rate_loss(at, compiled=compiled)}
            _append(rates, row, names)
        found[rate] = float(row["loss"])
    return min(found, key=lambda rate: found[rate])


def _row(table: Path, settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    """The row of a table with these settings."""
    if not table.exists():
        return None
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if all(row[name] == _cell(settings[name]) for name in names):
                return row
    return None


def _append(table: Path, row: Mapping[str, Any], names: Sequence[str]) -> None:
    cells = {name: _cell(value) for name, value in row.items()}
    is_new = not table.exists()
    with table.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(cells), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(cells)
    sys.stderr.write(", ".join(f"{name} {row[name]}" for name in (*names, "loss")) + "\n")


def _cell(value: Any) -> str:
    """Five digits: of a mean of a few seeds more are noise. The values of a curve in one cell."""
    if isinstance(value, list):
        return " ".join(f"{each:.5g}" for each in value)
    return str(value) if isinstance(value, (str, int)) else f"{value:.5g}"


if __name__ == "__main__":
    sys.exit(main())
