"""What does a model cost that is met for the first time? Descriptions, captures, first measured steps, and where it goes."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from benchmarks.live.cases import Training
from benchmarks.shared import memory
from benchmarks.shared.rounds import ratio

# A sample of the stack counts for the first part, from the innermost frame on, of which it has a file.
PARTS = {
    "verdicts": ("diagnostics/verdicts/",),
    "metrics": ("diagnostics/", "probes/training/live/"),
    "experiments": ("probes/settling.py", "probes/interventions/"),
    "remarks": ("probes/connections/", "probes/session/coefficient_origins.py"),
    "attention": ("probes/session/attention",),
    "operations seen": tuple(
        f"probes/{name}.py"
        for name in (
            "reading/recorder",
            "reading/places",
            "reading/known_operations",
            "reading/tensor_memory",
        )
    ),
    "structure": ("probes/structure/", "probes/session/find_structure.py"),
    "sums": ("probes/statistics/",),
    "the run": ("probes/run/",),
    "reading": ("probes/reading/",),
    "hooks": ("probes/",),
}
SHARED = ("probes/reading/graph.py", "probes/reading/operations.py")  # of several parts
THE_MODEL = "the model's own"
EVERY = 0.002  # seconds of processor time between two samples


def seconds(step: Callable[[], Any]) -> float:
    """Of the processor, for one step."""
    began = time.process_time()
    step()
    return time.process_time() - began


def first_costs(training: Training, rounds: int) -> dict[str, Any]:
    """Ratios to a plain forward, or to a plain step, with quartiles, and the parts of each."""
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
        with_backward = name in ("capture with gradients", "first measured step")
        found[name]["peak"] = peak_of(call) / own["step" if with_backward else "forward"]
        found[name]["parts"] = parts(call)
    return found


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of several calls, which are made in turn; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: of[1:] for name, of in times.items()}


def peak_of(call: Callable[[], Any]) -> float:
    """Peak of resident memory above what was resident before, in MiB."""
    floor = memory.trimmed()
    call()
    return memory.status("VmHWM") - floor


def first_step(training: Training) -> None:
    """The first measured step of a recorder."""
    from depthscope import probes

    with probes.record(training.model, gradients=True, metrics="live") as recorder:
        recorder.step(training.step())


def parts(step: Callable[[], Any]) -> dict[str, float]:
    """The shares of the processor time of a step, by sampling its stack; the largest first."""
    counts: Counter[str] = Counter()

    def sample(_: int, frame: FrameType | None) -> None:
        files = []
        while frame is not None:
            files.append(frame.f_code.co_filename.rpartition("/depthscope/")[2])
            frame = frame.f_back
        counts[next((part for file in files if (part := _part(file))), THE_MODEL)] += 1

    before = signal.signal(signal.SIGPROF, sample)
    try:
        signal.setitimer(signal.ITIMER_PROF, EVERY, EVERY)
        step()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)
    total = max(sum(counts.values()), 1)
    return {part: count / total for part, count in counts.most_common()}


def _part(file: str) -> str:
    """The part of this package that a file belongs to; that of the model's own code where it is none of ours."""
    if file.endswith("torch/nn/modules/module.py"):
        return THE_MODEL
    if file.startswith(("/", *SHARED)):
        return ""
    return next((part for part, files in PARTS.items() if file.startswith(files)), "")


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
