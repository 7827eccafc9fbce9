"""Which cases run, and how did they end? Every mutator in turn, each case in a process of its own, counted by outcome."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.isolation import in_child
from tests.fuzz.kinds import Kind, NotApplicable, Subject
from tests.fuzz.outcomes import (
    DIFFERENT,
    FAILURES,
    OUTCOMES,
    SECONDS,
    TRACEBACK,
    UNVERIFIED,
    Answer,
    as_json,
    of_process,
)

DOORS = 3
"""Most doors of a case; each has `SECONDS`, and the process that goes through them the sum."""


@dataclass(frozen=True)
class Result:
    """How one case ended."""

    kind: str
    mutator: str
    seed: int
    outcome: str
    answers: list[Answer] = field(default_factory=list)
    command: str = ""
    seconds: float = 0.0
    mib: float = 0.0

    @property
    def worst(self) -> Answer:
        """The door that decided."""
        return max(self.answers, key=lambda answer: OUTCOMES.index(answer.outcome))


def numbers_of(kind: str, mutator: str, seed: int) -> Random:
    """The random numbers of a case: of its name alone, so that it is the same in every campaign."""
    return Random(f"{kind}/{mutator}/{seed}")


def run_case(
    kind: Kind, mutator: str, seed: int, material: Path, *, keep: Path | None = None
) -> Result | None:
    """Mutate and open, each in a forked process.

    Parameters
    ----------
    kind : Kind
        Warmed up.
    mutator : str
        One of its mutators.
    seed : int
        Of the case.
    material : Path
        What `Kind.prepare` wrote.
    keep : Path, optional
        Where the files of a failing case go.

    Returns
    -------
    Result or None
        None where the mutator has nothing to mutate.

    Raises
    ------
    RuntimeError
        Where the mutator itself fails.
    """
    folder = Path(tempfile.mkdtemp(prefix="depthscope-fuzz-"))
    try:

        def mutate() -> Subject | None:
            try:
                return kind.mutators[mutator](numbers_of(kind.name, mutator, seed), material, folder)
            except NotApplicable:
                return None

        # In a process of its own: a library that was used on nonsense is not the one that the doors should get.
        made = in_child(mutate, seconds=120)
        if made.answer is None:
            if made.stderr.strip() or made.timed_out or made.signal:
                raise RuntimeError(f"mutator {mutator}, seed {seed}: {made.stderr[-1500:] or made}")
            return None
        subject: Subject = made.answer

        def open_doors() -> list[dict[str, str]]:
            return as_json(kind.doors(subject, material, numbers_of(kind.name, f"{mutator}/doors", seed)))

        ended = in_child(open_doors, seconds=DOORS * SECONDS, exit_functions=True)
        outcome, answers = of_process(ended, mib=kind.mib)
        if (folder / "canary").exists():
            outcome, answers = "code ran", [*answers, Answer("process", "code ran", "the canary file exists")]
        if outcome in FAILURES and keep is not None:
            _keep(folder, keep / f"{kind.name}-{mutator}-{seed}".replace("/", "-"), kind, subject, answers)
        return Result(
            kind.name, mutator, seed, outcome, answers, kind.command(subject), ended.seconds, ended.mib
        )
    finally:
        _remove(folder)


def _keep(folder: Path, target: Path, kind: Kind, subject: Subject, answers: list[Answer]) -> None:
    _remove(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not shutil: FIFOs, sockets and sparse files are copied as what they are.
    subprocess.run(["cp", "-a", "--sparse=always", folder, target], check=False)
    moved = json.loads(json.dumps(subject).replace(str(folder), str(target.resolve())))
    told = {"subject": moved, "command": kind.command(moved), "answers": as_json(answers)}
    (target / "case.json").write_text(json.dumps(told, indent=1))


def _remove(folder: Path) -> None:
    # Folders a thousand deep exceed Python's recursion; files without permissions are removed all the same.
    shutil.rmtree(folder, ignore_errors=True) if not (folder / "deep").exists() else None
    if folder.exists():
        subprocess.run(["rm", "-rf", folder], check=False)


def cases(kinds: Sequence[Kind], only: str | None, seed: int) -> Iterator[tuple[Kind, str, int]]:
    """Every mutator with the first seed, then every one with the next, without end."""
    chosen = [(kind, name) for kind in kinds for name in kind.mutators if only is None or only in name]
    for step in count(seed):
        for kind, name in chosen:
            yield kind, name, step


def run_cases(  # noqa: C901 (the workers' loop belongs here)
    kinds: Sequence[Kind],
    *,
    seconds: float | None = None,
    rounds: int | None = None,
    seed: int = 0,
    only: str | None = None,
    keep: Path | None = None,
    jobs: int = 1,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Run cases until the time or the rounds are over.

    Parameters
    ----------
    kinds : sequence of Kind
        What is mutated.
    seconds, rounds : number, optional
        Time; seeds for each mutator.
    seed : int
        The first.
    only : str, optional
        Part of the names of mutators.
    keep : Path, optional
        Where failing cases are kept.
    jobs : int
        Processes.
    on_result : callable, optional
        Called with each result.

    Returns
    -------
    list of Result
    """
    per_round = sum(1 for kind in kinds for name in kind.mutators if only is None or only in name)
    if not per_round:
        raise ValueError(f"no mutator with {only!r} in its name; see --list")
    # Not TemporaryDirectory: a case runs Python's exit functions, and these would remove the folder.
    material = Path(tempfile.mkdtemp(prefix="depthscope-fuzz-material-"))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def work(job: int) -> None:
        chosen = islice(cases(kinds, only, seed), job, None if rounds is None else rounds * per_round, jobs)
        for kind, name, step in chosen:
            if end is not None and time.monotonic() > end:
                break
            try:
                queue.put(run_case(kind, name, step, material / kind.name, keep=keep))
            except Exception as error:
                # A mutator that fails has tested nothing, which must not pass for a good result.
                queue.put(
                    Result(kind.name, name, step, TRACEBACK, [Answer("mutator", TRACEBACK, str(error))])
                )
        queue.put(_END)

    try:
        for kind in kinds:
            _prepare(kind, material / kind.name)
        end = None if seconds is None else time.monotonic() + seconds
        workers = [context.Process(target=work, args=(job,)) for job in range(jobs)]
        for worker in workers:
            worker.start()
        results = list(_collected(queue, jobs, on_result))
        for worker in workers:
            worker.join()
        return results
    finally:
        _remove(material)


_END = "end"


def _prepare(kind: Kind, folder: Path) -> None:
    folder.mkdir()
    made = in_child(lambda: kind.prepare(folder) or "made", seconds=600)
    if made.answer != "made":
        raise RuntimeError(f"the material of {kind.name} could not be made: {made.stderr[-2000:]}")
    kind.warm_up(folder)


def _collected(queue: Any, jobs: int, on_result: Callable[[Result], None] | None) -> Iterator[Result]:
    """Results as they come, until every worker has said that it ends."""
    while jobs:
        item = queue.get()
        if item == _END:
            jobs -= 1
        elif item is not None:  # None: the mutator had nothing to mutate
            if on_result is not None:
                on_result(item)
            yield item


def table(results: Iterable[Result]) -> str:
    """Outcomes by mutator, as Markdown."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for result in results:
        for key in ((result.kind, result.mutator), (result.kind, "**all**")):
            counts.setdefault(key, Counter())[result.outcome] += 1
    shown = [outcome for outcome in OUTCOMES if any(outcome in each for each in counts.values())]
    lines = [
        "| kind | mutator | cases | " + " | ".join(shown) + " |",
        "|---|---|" + "---:|" * (len(shown) + 1),
    ]
    for (kind, name), each in sorted(counts.items()):
        cells = " | ".join(str(each[outcome] or "") for outcome in shown)
        lines.append(f"| {kind} | {name} | {each.total()} | {cells} |")
    return "\n".join(lines)


def examples(results: Iterable[Result]) -> str:
    """One case of each outcome and message, the mutators that lead to it, and how to see it again."""
    seen: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.outcome in FAILURES or result.outcome == UNVERIFIED:
            seen.setdefault((result.outcome, _signature(result.worst)), []).append(result)
    lines = []
    for (outcome, _), found in sorted(
        seen.items(), key=lambda item: (-OUTCOMES.index(item[0][0]), -len(item[1]))
    ):
        first = found[0]
        mutators = Counter(result.mutator for result in found)
        lines.append(
            f"- **{outcome}** × {len(found)}, {first.worst.door}: {' '.join(first.worst.message.split())[:350]}\n"
            f"  - `python -m tests.fuzz {first.kind} --only {first.mutator} --seed {first.seed} --rounds 1`; "
            + ", ".join(f"{name} {number}" for name, number in mutators.most_common(8))
        )
    return "\n".join(lines)


def _signature(answer: Answer) -> str:
    """What messages of one cause have in common: the kind of error and the place where it was raised."""
    if answer.outcome == DIFFERENT:
        return answer.message.rpartition(": ")[2]
    error = answer.message.partition(":")[0] if answer.outcome == TRACEBACK else ""
    place = answer.message.rpartition("[")[2] if answer.message.endswith("]") else answer.message[:40]
    return f"{error} {place}"


def to_json(results: Sequence[Result]) -> str:
    """All results, for comparison with another campaign."""
    return json.dumps(
        [{**vars(result), "answers": as_json(result.answers)} for result in results], indent=0, default=str
    )
