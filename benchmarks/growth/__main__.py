"""How does the cost of an analysis grow? One factor at a time, with the exponent: ``python -m benchmarks.growth``.

An mHC decoder is trained for a step with gradients, captured, and analysed by one group of metrics at a time; depth, width,
tokens and streams are varied one by one. Each measured exponent is printed with the one expected from counting operations.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.capture.cases import Sizes, build
from benchmarks.growth import operations, page
from benchmarks.shared import process, tables

SECOND = 1.0  # parts that take longer are timed in the first round only
# Small enough for a step of a few seconds at the largest value of each factor, large enough for products to dominate.
BASE = Sizes(layers=4, width=256, batch=2, tokens=256)
QUICK_BASE = Sizes(layers=1, width=64, batch=1, tokens=32)
# Each value twice the one before: equal distances in logarithms.
FACTORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "depth": ("layers", (2, 4, 8, 16)),
    "width": ("width", (128, 256, 512, 1024)),
    "tokens": ("tokens", (64, 128, 256, 512)),
    "streams": ("streams", (2, 4, 8, 16)),
}


def main() -> None:
    """Measure, print the tables, draw the figures, and write what was asked for."""
    arguments = parsed()
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        return
    base = QUICK_BASE if arguments.quick else BASE
    results = {"factors": {name: points(name, base, arguments) for name in FACTORS}, "base": asdict(base)}
    results |= tables.circumstances("benchmarks.growth", page.PACKAGES) | {"rounds": arguments.rounds}
    print(json.dumps(results, indent=1) if arguments.json else page.text(results))
    if arguments.markdown:
        page.draw(results, arguments.markdown.parent / "images")
        tables.put_section(arguments.markdown, "benchmarks.growth", page.markdown(results))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="a small model, three sizes of each factor: only to see it run"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--markdown", type=Path, help="write its part of the page, docs/analyzers.md, and its figures"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def points(factor: str, base: Sizes, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Sizes with the seconds that each part takes, from the smallest."""
    field, values = FACTORS[factor]
    values = values[:3] if arguments.quick else values
    print(f"{factor}: {', '.join(map(str, values))}", file=sys.stderr)
    sizes = [asdict(replace(base, **{field: value})) for value in values]
    # One process for all sizes of a factor: their ratios are from the same state of the machine.
    answer = process.ask("benchmarks.growth", {"sizes": sizes, "rounds": arguments.rounds})
    if "reason" in answer:
        raise SystemExit(f"{factor}: {answer['reason']}")
    return [point | {"value": value} for point, value in zip(answer["points"], values, strict=True)]


def work(task: dict[str, Any]) -> dict[str, Any]:
    """What a worker process computes: seconds of each part, and the operations that it should take, for each size."""
    # Imported in the worker only: --help and the pages need no torch.
    import torch

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    for fields in task["sizes"]:
        sizes = Sizes(**fields)
        found.append({"seconds": seconds(sizes, task["rounds"]), "operations": operations.of(sizes)})
    return {"points": found}


def seconds(sizes: Sizes, rounds: int) -> dict[str, float]:
    """Median seconds of a plain step, of capturing it (the excess over plain), and of each group of metrics."""
    from benchmarks.analysis import measured_steps
    from depthscope.diagnostics import analyze

    plain = measured_steps.plain(build("mhc", sizes), backward=True)
    # Two models with the same weights: hooks of the recorder are on one of them only.
    captured = measured_steps.measured(build("mhc", sizes), backward=True, analysis=False)
    run = captured()
    groups = operations.groups()
    parts: dict[str, Callable[[], Any]] = {"plain": plain, "captured": captured}
    parts |= {name: partial(analyze, run, metrics=chosen) for name, chosen in groups.items()}
    taken = medians(parts, rounds)
    excess = max(taken.pop("captured") - taken["plain"], 1e-6)  # positive: an exponent needs its logarithm
    return {"capture": excess, "a plain step": taken.pop("plain"), **taken}


def medians(parts: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each part, taken in turn; the first round counts only for what takes more than a second."""
    from benchmarks.analysis.measure import timed

    taken = {name: [timed(part, 1)] for name, part in parts.items()}
    short = {name: values[0] < SECOND for name, values in taken.items()}
    # In turn, so that a slower minute of the machine is in all parts.
    for _ in range(rounds):
        for name, part in parts.items():
            if short[name]:
                taken[name].append(timed(part, 1))
    return {name: statistics.median(values[short[name] :]) for name, values in taken.items()}


if __name__ == "__main__":
    main()
