"""What does a measured training step cost? Ratios of CPU time to plain steps: ``python -m benchmarks.live``.

Steps of all ways to record are taken in turn with plain ones, on one model in one process with one thread, and the medians of
their CPU times are given as ratios to that of the plain step. Attaching the hooks of the next step is counted; building the
run at the end of the training is not. ``--once`` adds what a model costs that is met for the first time, ``--growth`` the
memory over so many measured steps.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from benchmarks.live import page
from benchmarks.live.cases import CASES, QUICK, Training
from benchmarks.live.once import first_costs, growth
from benchmarks.shared import process, tables
from benchmarks.shared.rounds import ratio

# By what is recorded; "between": a recorder is open, and none of the steps is measured.
WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "plain again": None,
    "between measured steps": {"metrics": "live", "start_step": 10**9},
    "statistics": {},
    'metrics="live"': {"metrics": "live"},
    'metrics="live", each row judged': {"metrics": "live", "on_finding": lambda step, finding: None},
    'metrics="all"': {"metrics": "all"},
}
WARM_UPS = 2


def main() -> None:
    """Measure, and print the table."""
    arguments = parsed()
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        return
    cases = QUICK if arguments.quick else CASES
    results: dict[str, Any] = {"times": {}}
    for name in arguments.cases or cases:
        print(cases[name][0], file=sys.stderr)
        task = {"case": name, "quick": arguments.quick, "rounds": arguments.rounds, "ways": arguments.ways}
        results["times"][name] = process.ask("benchmarks.live", task)
        for what in ("once", "growth"):
            if getattr(arguments, what):
                answer = process.ask("benchmarks.live", {**task, what: getattr(arguments, what)})
                results.setdefault(what, {})[name] = answer
    results |= tables.circumstances("benchmarks.live", ("torch", "transformers", "hyper-connections"))
    text = page.markdown(results, {name: title for name, (title, _) in cases.items()})
    print(text)
    if arguments.markdown:
        tables.put_section(arguments.markdown, "benchmarks.live", text)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--quick", action="store_true", help="tiny models: only to see it run")
    parser.add_argument(
        "--once", action="store_true", help="descriptions, captures, first measured steps too"
    )
    parser.add_argument("--growth", type=int, metavar="STEPS", help="memory over so many measured steps too")
    parser.add_argument("--markdown", type=Path, help="write its part of the page, docs/benchmarks.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.ways = ["plain", *(way for way in arguments.ways if way != "plain")]
    return arguments


def work(task: dict[str, Any]) -> dict[str, Any]:
    """What a process computes: times of all ways"""
    from depthscope import probes

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", probes.ProbeWarning)  # a step that was not measured must not look cheap
    torch.set_num_threads(1)
    training = (QUICK if task["quick"] else CASES)[task["case"]][1]()
    with redirect_stderr(StringIO()):  # findings about untrained networks
        if "once" in task:
            return first_costs(training, min(task["rounds"], 5))
        if "growth" in task:
            return growth(training, task["growth"])
        return times(training, task["ways"], task["rounds"])


def step_of(training: Training, way: str) -> Callable[[], Any]:
    """One step of a training, recorded in one way."""
    options = WAYS[way]
    if options is None:
        return training.step
    from depthscope import probes

    recorder = probes.record(training.model, gradients=True, **options)

    def recorded() -> float:
        with recorder:  # at whose end the hooks of the next step are attached, as in a loop
            started = time.process_time()
            recorder.step(training.step())
            return time.process_time() - started

    return recorded


def times(training: Training, ways: list[str], rounds: int) -> dict[str, Any]:
    """Rows of every way: ratios to plain, with quartiles."""
    steps = {way: step_of(training, way) for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(WARM_UPS + rounds):
        # Turned round by round: no way always follows the same one.
        order = ways[number % len(ways) :] + ways[: number % len(ways)]
        for way in order:
            started = time.process_time()
            own = steps[way]()
            whole = time.process_time() - started
            if number >= WARM_UPS:
                seconds[way].append(own if WAYS[way] is not None else whole)
    return {way: ratio(values, seconds["plain"]) for way, values in seconds.items()}


if __name__ == "__main__":
    main()
