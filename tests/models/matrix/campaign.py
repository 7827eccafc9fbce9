"""How is each model tried? In a forked process of its own, with a limit of time and memory; results come as they end."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tests.models.matrix.cases import SEQUENCES, TOKENS, Case, NotBuildable
from tests.models.matrix.isolation import Ended, in_child
from tests.models.matrix.verdict import CRASHED, NOT_BUILDABLE, Verdict, judge

SECONDS = 20
"""Of a processor, for one model with all of its batches."""
_END = "end"


@dataclass(frozen=True)
class Result:
    """What came of one model with one batch."""

    package: str
    name: str
    outcome: str
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def tried(case: Case, seed: int) -> list[Result]:
    """Build and judge one model, in a process of its own."""
    ended = in_child(lambda: [asdict(result) for result in _tried(case, seed)], seconds=SECONDS)
    if ended.answer is None:
        return [Result(case.package, case.name, CRASHED, _fate(ended), seconds=ended.seconds)]
    return [Result(**{**answer, "seconds": ended.seconds / len(ended.answer)}) for answer in ended.answer]


def _fate(ended: Ended) -> str:
    if ended.timed_out:
        return f"time: no answer in {SECONDS} s"
    lines = ended.stderr.strip().splitlines() or [f"signal {ended.signal}"]
    return f"process: {lines[-1][:300]}"


def _tried(case: Case, seed: int) -> list[Result]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if case.judged is not None:
        outcome, reason = case.judged(seed)
        return [Result(case.package, case.name, outcome, " ".join(reason.split()))]
    assert case.subjects is not None
    try:
        subjects = case.subjects(seed)
    except NotBuildable as error:
        return [Result(case.package, case.name, NOT_BUILDABLE, " ".join(str(error).split()))]
    results = []
    for subject in subjects:
        verdict: Verdict = judge(subject.model, subject.make, case.expected, (SEQUENCES, TOKENS))
        facts = {
            "class": type(subject.model).__name__,
            "batch": subject.recipe,
            "states": verdict.states,
            **verdict.facts,
        }
        name = f"{case.name} {subject.note}".strip()
        results.append(Result(case.package, name, verdict.outcome, verdict.reason, facts))
    return results


def run_cases(
    cases: Sequence[Case], *, seed: int = 0, jobs: int = 1, on_result: Callable[[Result], None] | None = None
) -> list[Result]:
    """Try models in several processes.

    Parameters
    ----------
    cases : sequence of Case
    seed : int
        Of weights and of captures.
    jobs : int
        Processes.
    on_result : callable, optional
        Called with each result as it comes.

    Returns
    -------
    list of Result
        By package and name.
    """
    context = multiprocessing.get_context("fork")
    todo, queue = context.SimpleQueue(), context.SimpleQueue()

    def work() -> None:
        while (number := todo.get()) is not None:
            for result in tried(cases[number], seed):
                queue.put(result)
        queue.put(_END)

    workers = [context.Process(target=work) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for number in [*range(len(cases)), *[None] * jobs]:
        todo.put(number)
    results = list(_collected(queue, jobs, on_result))
    for worker in workers:
        worker.join()
    return sorted(results, key=lambda result: (result.package, result.name))


def _collected(queue: Any, jobs: int, on_result: Callable[[Result], None] | None) -> Iterator[Result]:
    while jobs:
        item = queue.get()
        if item == _END:
            jobs -= 1
            continue
        if on_result is not None:
            on_result(item)
        yield item
