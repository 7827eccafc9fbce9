"""Are the analyzers accurate, and how fast? Compared with other packages: ``python -m benchmarks.analysis``.

The answer of every tool is first compared with a float64 reference. Then all are timed in turn, several rounds, and the
medians are given as ratios in the same process. Peers that are not installed are rows with that reason. Every goal is printed
with the number that was found.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.analysis import measure, page
from benchmarks.analysis.comparison import Comparison
from benchmarks.shared import process, tables

TOPICS = ("cka", "ranks")
# Names of distributions, for the versions on the page.
PEERS = ("ckatorch", "repsim", "torchlens")


def main() -> None:
    """Measure, print the tables, and write what was asked for."""
    arguments = parsed()
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        return
    found = compared(arguments)
    results = {"comparisons": found, "rounds": arguments.rounds}
    results |= tables.circumstances("benchmarks.analysis", (*page.PACKAGES, *PEERS))
    text = page.markdown(results)
    print(text)
    if arguments.markdown:
        tables.put_section(arguments.markdown, "benchmarks.analysis", text)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--topics", nargs="+", choices=TOPICS, default=TOPICS)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small sizes, two rounds, one process for each comparison: only to see it run",
    )
    parser.add_argument("--markdown", type=Path, help="write its part of the page, docs/benchmarks.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.rounds = min(arguments.rounds, 2) if arguments.quick else arguments.rounds
    return arguments


def compared(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each comparison's title, note, baseline and rows; each group of tools in a process of its own."""
    found = {}
    for topic in arguments.topics:
        for name, comparison in comparisons(topic, quick=arguments.quick).items():
            found[name] = {
                "title": comparison.title,
                "note": comparison.note,
                "baseline": comparison.baseline,
                "rows": rows(topic, name, comparison, arguments),
            }
    return found


def comparisons(topic: str, *, quick: bool) -> dict[str, Comparison]:
    return importlib.import_module(f"benchmarks.analysis.{topic}").comparisons(quick)


def rows(topic: str, name: str, comparison: Comparison, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every tool's row, in the order of the comparison."""
    found: dict[str, Any] = {}
    # Quick runs give up the isolation of peers for one start of Python.
    for names in [list(comparison.tools)] if arguments.quick else comparison.groups():
        print(f"{name}: {'; '.join(names)}", file=sys.stderr)
        task = {"topic": topic, "comparison": name, "names": names}
        answer = process.ask(
            "benchmarks.analysis", task | {"rounds": arguments.rounds, "quick": arguments.quick}
        )
        # A crash of the worker, such as a segmentation fault of a peer, is the reason in all its rows.
        if "reason" in answer:
            answer = dict.fromkeys(names, answer)
        found = answer | found  # every group has the baseline: its row is that of the first
    return {tool: found[tool] for tool in comparison.tools}


def work(task: dict[str, Any]) -> dict[str, Any]:
    """What a worker process computes: the rows of some tools for one comparison."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    # Some libraries read no environment variable after import.
    torch.set_num_threads(1)
    comparison = comparisons(task["topic"], quick=task["quick"])[task["comparison"]]
    return measure.rows(comparison, task["names"], task["rounds"])


if __name__ == "__main__":
    main()
