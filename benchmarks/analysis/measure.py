"""What is measured in one process? The error of each tool against a float64 reference, its time, its peak memory."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.analysis.comparison import Comparison, Make, Step, Tool
from benchmarks.shared.memory import status, trimmed
from benchmarks.shared.process import reason
from benchmarks.shared.rounds import ratio

PATIENCE = 6.0  # seconds for the rounds of one tool; a slower one is run once
WARM = 0.05  # seconds: shorter steps are repeated in a round, for the process clock has steps of milliseconds


def rows(comparison: Comparison, names: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Errors and times of every tool, or the reasons why there are none.

    ``comparison``: tools, inputs and references.
    ``names``: tools, the baseline first.
    ``rounds``: number of times that each is timed.
    Returns: Tool to ``errors`` by variant, and ``times`` by size.
    """
    found: dict[str, dict[str, Any]] = {name: {"errors": {}, "times": {}} for name in names}
    for variant, make in comparison.variants.items():
        for name, cell in errors(comparison, names, make).items():
            found[name]["errors"][variant] = cell
    for size, make in comparison.sizes.items():
        data = make()
        for name, timed in times(comparison, names, size, data, rounds).items():
            found[name]["times"][size] = timed
    return found


def errors(comparison: Comparison, names: list[str], make: Make) -> dict[str, float | str]:
    """The error of each tool on the same data."""
    data, truths = make(), dict[str, np.ndarray]()
    return {name: error(comparison, comparison.tools[name], data, truths) for name in names}


def error(comparison: Comparison, tool: Tool, data: Any, truths: dict[str, np.ndarray]) -> float | str:
    """The error of a tool's answer, or the message that it raised; ``truths`` caches the references of this data."""
    name = tool.truth or next(iter(comparison.truths))
    try:
        answer = np.asarray(tool.prepare(data)(), dtype=np.float64)
    except Exception as failure:
        return reason(failure)
    if name not in truths:
        truths[name] = comparison.truths[name](data)
    return comparison.error(answer, truths[name])


def times(
    comparison: Comparison, names: list[str], size: str, data: Any, rounds: int
) -> dict[str, dict[str, Any]]:
    """Cells of every tool at one size. Memory is that of the first run, whose time counts only for tools without rounds."""
    cells: dict[str, dict[str, Any]] = {}
    ready: dict[str, Step] = {}
    first: dict[str, float] = {}
    for name in names:
        tool = comparison.tools[name]
        if size in tool.skips:
            cells[name] = {"reason": "not tried: minutes"}
            continue
        try:
            step = tool.prepare(data)
            # What prepare() allocated is resident by now: the peak above it is the step's own.
            floor = trimmed()
            first[name] = timed(step, 1)
            cells[name] = {"peak": status("VmHWM") - floor}
            ready[name] = step
        except Exception as failure:
            cells[name] = {"reason": reason(failure)}
    # Without it there is nothing to divide by; the cells have their reasons and memory.
    if comparison.baseline not in ready:
        return cells
    seconds = interleaved(ready, first, rounds, comparison.baseline)
    base = seconds[comparison.baseline]
    for name, values in seconds.items():
        cells[name] |= ratio(values, base)
    return cells


def interleaved(
    ready: dict[str, Step], first: dict[str, float], rounds: int, baseline: str
) -> dict[str, list[float]]:
    """Seconds of the rounds of each tool, taken in turn, as long as its `PATIENCE` lasts; else those of the first run."""
    # The first run tells how many repetitions last WARM seconds; at most 500.
    repeats = {name: max(1, int(WARM / max(first[name], 1e-4))) for name in ready}
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, step in ready.items():
            # The baseline takes part in all rounds, for its median divides all others.
            if name == baseline or sum(seconds[name]) + first[name] <= PATIENCE:
                seconds[name].append(timed(step, repeats[name]))
    return {name: values or [first[name]] for name, values in seconds.items()}


def timed(step: Step, repeats: int) -> float:
    """Processor seconds of one step: unlike the clock on the wall they do not count other processes."""
    started = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - started) / repeats
