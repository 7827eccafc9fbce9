"""How did a program answer to bad input? One word for each way, from a clear sentence to a crash."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tests.fuzz.isolation import Ended, Printed

CLEAR, EQUAL = "clear", "equal"
"""One sentence; accepted, with what the unmutated input gives."""
UNVERIFIED = "unverified"
"""Accepted with other data, and the run itself says that it was not verified."""
NOISY, DIFFERENT, TRACEBACK = "noisy", "different", "traceback"
"""More than one sentence; wrong passes for right; an error that is nobody's sentence."""
MEMORY, HANG, CODE, CRASH = "memory", "hang", "code ran", "crash"

# From harmless to worst: a case has the worst outcome of its doors.
OUTCOMES = (CLEAR, EQUAL, UNVERIFIED, NOISY, DIFFERENT, TRACEBACK, MEMORY, HANG, CODE, CRASH)
FAILURES = OUTCOMES[OUTCOMES.index(NOISY) :]

# Printed by Python where an error has no one to go to, and by HDF5 where its own error stack is not switched off.
_NOISE = ("Exception ignored", "HDF5-DIAG", "Traceback (most recent call last)")


@dataclass(frozen=True)
class Answer:
    """What one door answered."""

    door: str
    outcome: str
    message: str


SECONDS = 10.0
"""Processor time of one door, with that of the processes that it starts."""


def _seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _in_time(answer: Answer, start: float) -> Answer:
    spent = _seconds() - start
    return (
        answer
        if spent < SECONDS
        else Answer(answer.door, HANG, f"{spent:.0f} s; then {answer.outcome}: {answer.message}")
    )


def of_call(
    door: str, call: Callable[[], tuple[str, str]], *, refusals: tuple[type, ...] = (ValueError, OSError)
) -> Answer:
    """Call a function of the library."""
    printed, start = Printed(), _seconds()
    try:
        outcome, message = call()
    except refusals as error:
        outcome, message = (
            (CLEAR, f"{type(error).__name__}: {error}") if str(error) else (TRACEBACK, repr(error))
        )
    except MemoryError as error:
        outcome, message = MEMORY, last_frame(error)
    except BaseException as error:
        outcome, message = TRACEBACK, last_frame(error)
    # What is closed by the collector may print, as h5py and zipfile do.
    gc.collect()
    _, stderr = printed.take()
    if stderr.strip() and outcome in (CLEAR, EQUAL, UNVERIFIED) and any(noise in stderr for noise in _NOISE):
        outcome, message = NOISY, stderr
    return _in_time(Answer(door, outcome, message[:2000]), start)


def of_command(words: list[str], *, accepted: str = EQUAL) -> Answer:
    """Call the command line."""
    from depthscope.app.cli.main import main

    printed, start = Printed(), _seconds()
    door = words[0] if words else "depthscope"
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    except MemoryError as error:
        return Answer(door, MEMORY, last_frame(error))
    except BaseException as error:
        return Answer(door, TRACEBACK, last_frame(error))
    gc.collect()
    stdout, stderr = printed.take()
    return _in_time(Answer(door, *_of_output(code, stdout, stderr, accepted)), start)


def _of_output(code: Any, stdout: str, stderr: str, accepted: str) -> tuple[str, str]:
    # A remark on what is going on, printed before it fails, is no second sentence.
    lines = [line for line in stderr.rstrip("\n").split("\n") if not line.startswith("depthscope: ")]
    if any(noise in stderr for noise in _NOISE):
        return NOISY, stderr[-2000:]
    if code == 2:
        if stdout.strip() or len(lines) != 1 or not lines[0].strip():
            return (
                NOISY,
                f"exit 2 with {len(lines)} lines on stderr, {len(stdout)} characters on stdout: {stderr[:1500]}",
            )
        return CLEAR, lines[0][:2000]
    if code not in (0, 1, None):
        return TRACEBACK, f"exit code {code}: {stderr[-1500:]}"
    return accepted, f"exit code {code}"


def last_frame(error: BaseException) -> str:
    """Where an error was raised and what it says, in one line."""
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    place = f"{frames[-1].filename.rpartition('site-packages/')[2]}:{frames[-1].name}" if frames else "?"
    return f"{type(error).__name__}: {str(error)[:600]} [{place}]"


def of_process(ended: Ended, *, mib: float) -> tuple[str, list[Answer]]:
    """The outcome of a case, and the answers of its doors."""
    answers = [Answer(**answer) for answer in ended.answer or ()]
    if ended.timed_out:
        answers.append(Answer("process", HANG, f"stopped after {ended.seconds:.0f} s; {ended.mib:.0f} MiB"))
    elif ended.signal:
        answers.append(Answer("process", CRASH, f"signal {ended.signal}: {ended.stderr[-500:]}"))
    elif ended.answer is None:
        kind = MEMORY if "MemoryError" in ended.stderr else TRACEBACK
        answers.append(Answer("process", kind, ended.stderr[-500:]))
    elif ended.mib > mib:
        answers.append(Answer("process", MEMORY, f"{ended.mib:.0f} MiB above the start, {mib:.0f} allowed"))
    elif "Exception ignored" in ended.stderr or "HDF5-DIAG" in ended.stderr:
        answers.append(Answer("process", NOISY, ended.stderr[-500:]))
    return max((answer.outcome for answer in answers), key=OUTCOMES.index), answers


def as_json(answers: list[Answer]) -> list[dict[str, str]]:
    """Answers on their way from the child to its parent."""
    return [asdict(answer) for answer in answers]
