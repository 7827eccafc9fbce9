"""One process's measurements: how far is each tool from the float64 answer, what does it take, how much memory?"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.analysis.question import CannotTakeError, Make, Question, Step, Tool
from benchmarks.shared.memory import status, trimmed
from benchmarks.shared.rounds import ratio

PATIENCE = 6.0  # seconds for the rounds of one tool; a slower one is run once
NO_DATA = "no data"  # what a cell begins with where the states could not be had
WARM = 0.05  # seconds: what takes less is repeated in a round, since the clock ticks in milliseconds


def rows(question: Question, names: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """What every tool answers and takes, or why it does not.

    Parameters
    ----------
    question : Question
        What is asked.
    names : list of str
        Tools, the baseline first.
    rounds : int
        How often each is timed.

    Returns
    -------
    dict
        Tool to ``errors`` by variant, and ``times`` by size.
    """
    found: dict[str, dict[str, Any]] = {name: {"errors": {}, "times": {}} for name in names}
    asked = dict(question.variants)
    own = [name for name in names if not question.tools[name].package]
    if len(own) > 1:  # else the baseline is only here to be divided by
        asked |= question.own_variants
    for variant, make in asked.items():
        chosen = own if variant in question.own_variants else names
        for name, cell in errors(question, chosen, make).items():
            found[name]["errors"][variant] = cell
    for size, make in question.sizes.items():
        data = make()
        for name, cell in times(question, names, size, data, rounds).items():
            found[name]["times"][size] = cell
    return found


def errors(question: Question, names: list[str], make: Make) -> dict[str, float | str]:
    """How far each tool is from the answer on the same data."""
    answering = [name for name in names if question.tools[name].answers]
    try:
        data = make()
    except ImportError as missing:
        return dict.fromkeys(answering, f"{NO_DATA}: {missing}")
    truths: dict[str, np.ndarray] = {}
    return {name: error(question, question.tools[name], data, truths) for name in answering}


def error(question: Question, tool: Tool, data: Any, truths: dict[str, np.ndarray]) -> float | str:
    """How far a tool's answer is from the float64 one, or what it said instead; ``truths`` is filled as they are needed."""
    name = tool.truth or next(iter(question.truths))
    try:
        answer = np.asarray(tool.prepare(data)(), dtype=np.float64)
    except Exception as failure:
        return reason(failure)
    if name not in truths:
        truths[name] = question.truths[name](data)
    return question.error(answer, truths[name])


def times(
    question: Question, names: list[str], size: str, data: Any, rounds: int
) -> dict[str, dict[str, Any]]:
    """Cells of every tool at one size; the first run shows the memory, and counts where a tool has no more."""
    cells: dict[str, dict[str, Any]] = {}
    ready: dict[str, Step] = {}
    first: dict[str, float] = {}
    for name in names:
        tool = question.tools[name]
        if size in tool.skips:
            cells[name] = {"reason": "not tried: minutes"}
            continue
        try:
            step = tool.prepare(data)
            floor = trimmed()
            first[name] = timed(step, 1)
            cells[name] = {"peak": status("VmHWM") - floor}
            ready[name] = step
        except Exception as failure:
            cells[name] = {"reason": reason(failure)}
    if question.baseline not in ready:
        return cells
    seconds = interleaved(ready, first, rounds, question.baseline)
    return {name: cell | of(name, seconds, question.baseline) for name, cell in cells.items()}


def of(name: str, seconds: dict[str, list[float]], baseline: str) -> dict[str, Any]:
    return ratio(seconds[name], seconds[baseline]) if name in seconds else {}


def interleaved(
    ready: dict[str, Step], first: dict[str, float], rounds: int, baseline: str
) -> dict[str, list[float]]:
    """Seconds of the rounds of each tool, taken in turn; the first run is one only where there is no time for more."""
    repeats = {name: max(1, int(WARM / max(first[name], 1e-4))) for name in ready}
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, step in ready.items():
            if name == baseline or sum(seconds[name]) + first[name] <= PATIENCE:
                seconds[name].append(timed(step, repeats[name]))
    return {name: values or [first[name]] for name, values in seconds.items()}


def timed(step: Step, repeats: int) -> float:
    """Seconds of the processor for one step."""
    started = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - started) / repeats


def reason(failure: Exception) -> str:
    """What a tool said, in a line."""
    if isinstance(failure, ModuleNotFoundError):
        return "not installed"
    first = (str(failure).strip() or repr(failure)).splitlines()[0]
    return first if isinstance(failure, CannotTakeError) else f"{type(failure).__name__}: {first[:80]}"
