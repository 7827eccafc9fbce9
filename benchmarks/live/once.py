"""What does a model cost that is met for the first time? Descriptions, captures, first measured steps."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.live.cases import Training
from benchmarks.shared import memory
from benchmarks.shared.rounds import ratio


def seconds(step: Callable[[], Any]) -> float:
    """Of the processor, for one step."""
    began = time.process_time()
    step()
    return time.process_time() - began


def first_costs(training: Training, rounds: int) -> dict[str, Any]:
    """Ratios to a plain forward, or to a plain step, with quartiles."""
    from depthscope import probes

    def forward() -> None:
        with torch.no_grad():
            training.model(**training.batch)

    def first_steps() -> list[float]:
        with probes.record(training.model, gradients=True, metrics="live") as recorder:
            return [seconds(lambda: recorder.step(training.step())) for _ in range(3)]

    def capture(**options: Any) -> None:
        probes.capture(training.model, training.batch, **options)

    calls: dict[str, Callable[[], Any]] = {
        "describe": lambda: probes.describe(training.model, training.batch),
        "capture": capture,
        "capture with gradients": lambda: capture(gradients=True),
    }
    plain: dict[str, Callable[[], Any]] = {"forward": forward, "step": training.step}
    first_steps()  # imports, compiled passes
    times = in_turn(plain | calls, rounds)
    steps = [first_steps() for _ in range(rounds)]
    found = {name: ratio(times[name], times["forward"]) for name in calls}
    for number, name in enumerate(("first measured step", "second measured step", "third measured step")):
        found[name] = ratio([of[number] for of in steps], times["step"])
    own = {name: peak_of(call) for name, call in plain.items()}
    for name, call in (*calls.items(), ("first measured step", lambda: first_step(training))):
        base = "step" if name in ("capture with gradients", "first measured step") else "forward"
        found[name]["peak"] = peak_of(call) / own[base]
    return found


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of several calls, which are made in turn; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: of[1:] for name, of in times.items()}


def peak_of(call: Callable[[], Any]) -> float:
    """What torch allocates at most at one time, in MiB: unlike resident memory the same number each time."""
    gc.collect()  # what an earlier call left would be freed in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = found.profiler.kineto_results.events()
    return max(accumulate(each.nbytes() for each in events if each.name() == "[memory]")) / 2**20


def first_step(training: Training) -> None:
    """The first measured step of a recorder."""
    from depthscope import probes

    with probes.record(training.model, gradients=True, metrics="live") as recorder:
        recorder.step(training.step())


def growth(training: Training, steps: int) -> dict[str, Any]:
    """Resident memory in the middle and at the end of many measured steps, in MiB, and the numbers of a row in bytes."""
    from depthscope import probes

    with probes.record(training.model, gradients=True, metrics="live") as recorder:
        found = {}
        for number in range(1, steps + 1):
            recorder.step(training.step())
            if number in (steps // 20, steps):
                found[number] = memory.trimmed()
    rows = recorder.run["metrics"].to_dataset()
    numbers = sum(of.nbytes for of in rows.data_vars.values() if "step" in of.dims) / steps
    return {"mib": found, "bytes_of_a_row": numbers}
