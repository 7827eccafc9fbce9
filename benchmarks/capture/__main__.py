"""What does capturing cost? Ratios to the same steps without probes: ``python -m benchmarks.capture``.

The states of every tool are first compared with those of plain hooks. Then steps of all tools in a process are timed in turn,
several rounds, and the medians are given as ratios to the median of the plain step in the same process. Peers that are not
installed, or cannot take a model, are rows with the reason. ``--memory`` adds the peak memory, one process per tool.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.capture import measure, page
from benchmarks.capture.cases import CASES, Sizes
from benchmarks.capture.tools import PEERS, TOOLS, groups
from benchmarks.shared import process, tables


def main() -> None:
    """Measure, print the tables, and write what was asked for."""
    arguments = parsed()
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        return
    results = {"times": timings(arguments), "memory": memories(arguments) if arguments.memory else {}}
    results |= tables.circumstances("benchmarks.capture", (*page.PACKAGES, *PEERS))
    results["rounds"] = arguments.rounds
    text = page.markdown(results, small=arguments.small)
    print(text)
    if arguments.markdown:
        part = "benchmarks.capture.small" if arguments.small else "benchmarks.capture"
        tables.put_section(arguments.markdown, part, text)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--only", nargs="+", choices=TOOLS, help="tools; plain is always included")
    parser.add_argument(
        "--memory", action="store_true", help="peak memory too: a process per tool, some minutes"
    )
    parser.add_argument("--markdown", type=Path, help="write the page, docs/benchmarks.md")
    parser.add_argument("--small", action="store_true", help="write the page's part of small sizes instead")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def sizes_of(arguments: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(arguments, name) for name in ("layers", "width", "batch", "tokens")}


def timings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Case to mode to rows; each group of tools in a process of its own."""
    found: dict[str, Any] = {}
    for names in wanted(arguments.only):
        task = {"cases": arguments.cases, "sizes": sizes_of(arguments), "rounds": arguments.rounds}
        answer = ask(task | {"names": names})
        # The first group has the plain step, of which all others are ratios.
        if not found and "reason" in answer:
            raise SystemExit(answer["reason"])
        for case in arguments.cases:
            entry = answer.get(case, {"modes": {mode: {names[-1]: answer} for mode in measure.MODES}})
            known = found.setdefault(case, entry)
            for mode, rows in entry["modes"].items():
                known["modes"][mode] |= {n: row for n, row in rows.items() if n not in known["modes"][mode]}
    return found


def wanted(only: list[str] | None) -> Iterator[list[str]]:
    for names in groups():
        chosen = [name for name in names if only is None or name == "plain" or name in only]
        if only is None or len(chosen) > 1:
            yield chosen


def memories(arguments: argparse.Namespace) -> dict[str, Any]:
    """Case to mode to tool to MiB."""
    found: dict[str, Any] = {}
    chosen = TOOLS if arguments.only is None else ("plain", *arguments.only)
    names = [name for name in TOOLS if name in chosen and name != "plain again"]
    # The tiny blocks are there for the time of a hook only.
    for case in (case for case in arguments.cases if case != "tiny"):
        for mode in measure.MODES:
            for name in names:
                task = {"cases": [case], "sizes": sizes_of(arguments), "mode": mode, "names": [name]}
                found.setdefault(case, {}).setdefault(mode, {})[name] = ask(task)
    return found


def ask(task: dict[str, Any]) -> dict[str, Any]:
    """Run one task in a process of its own; a tool that is not installed needs none."""
    last = task["names"][-1]
    # A package is imported under its name with underscores.
    if last in PEERS and find_spec(last.replace("-", "_")) is None:
        return {"reason": "not installed"}
    print(f"{', '.join(task['cases'])}: {', '.join(task['names'])}", file=sys.stderr)
    return process.ask("benchmarks.capture", task)


def work(task: dict[str, Any]) -> dict[str, Any]:
    """What a worker process computes: times of all cases, or the memory of one tool on one of them."""
    from depthscope import probes

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", probes.ProbeWarning)  # a step that was not measured must not look cheap
    torch.set_num_threads(1)
    sizes, names = Sizes(**task["sizes"]), task["names"]
    if "mode" in task:
        return measure.peaks(task["cases"][0], sizes, name=names[0], backward=measure.MODES[task["mode"]])
    return {case: measure.times(case, sizes, names=names, rounds=task["rounds"]) for case in task["cases"]}


if __name__ == "__main__":
    main()
