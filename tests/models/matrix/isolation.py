"""What happens to a process that does something dangerous? It is forked, watched and measured, and never waited for long."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MIB = 2**20
# A machine that many share stretches the clock. Seconds count in which a process computes, or in which it waits for
# something; not those in which it waits for a processor. On the clock it may take up to this factor.
PATIENCE = 30
# A guard against an allocation so large that the machine itself would be in trouble; the limit that is judged is that of
# resident memory, which is far lower.
ADDRESS_SPACE = 6 * 2**30


@dataclass(frozen=True)
class Ended:
    """How a forked process ended."""

    answer: Any  # what the function returned; None where it did not get that far
    stderr: str
    signal: int
    timed_out: bool
    seconds: float
    mib: float  # of its highest resident memory, or that of a process that it started, above its own at the beginning


def in_child(function: Callable[[], Any], *, seconds: float, exit_functions: bool = False) -> Ended:
    """Call a function in a forked process; `exit_functions`: and do what Python does at its exit, where libraries print."""
    # A lock that another thread holds at the fork would stay locked in the child for ever.
    assert threading.active_count() == 1, [thread.name for thread in threading.enumerate()]
    answer, out, err, beginning, below = map(os.memfd_create, ("answer", "out", "err", "beginning", "below"))
    start = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        # Less than the parent has: pages of shared libraries are mapped when they are used.
        os.write(beginning, str(_resident_mib()).encode())
        _child(function, answer, below, out, err, exit_functions)
    timed_out = not _wait(pid, seconds)
    if timed_out:
        # The group: the child may have started processes, which would go on.
        os.killpg(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    text = os.pread(answer, os.fstat(answer).st_size, 0)
    size = os.fstat(err).st_size
    stderr = os.pread(err, 20_000, max(0, size - 20_000)).decode(errors="replace")
    before = float(os.pread(beginning, 100, 0) or 0)
    # A process that the child started imports the same libraries: it begins at about the same size.
    highest = max(usage.ru_maxrss / 1024, float(os.pread(below, 100, 0) or 0))
    for fd in (answer, out, err, beginning, below):
        os.close(fd)
    return Ended(
        answer=json.loads(text) if text else None,
        stderr=stderr,
        signal=0 if timed_out or not os.WIFSIGNALED(status) else os.WTERMSIG(status),
        timed_out=timed_out,
        seconds=time.monotonic() - start,
        mib=max(0.0, highest - before),
    )


def _resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / MIB


def _child(
    function: Callable[[], Any], answer: int, below: int, out: int, err: int, exit_functions: bool
) -> None:
    """Never returns: whatever happens, the copy of the parent must not go on with the parent's work."""
    code = 1
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        # pytest replaces these by objects that the parent reads.
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.write(answer, json.dumps(function()).encode())
        os.write(below, str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024).encode())
        if exit_functions:
            import atexit

            atexit._run_exitfuncs()
        code = 0
    except BaseException:
        import traceback

        # Memory may be what is missing: the report is a service, the exit code is what counts.
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, seconds: float) -> bool:
    """Whether the process ended in its time."""
    descriptor = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        start, idle, computed = time.monotonic(), 0.0, 0.0
        while time.monotonic() < start + PATIENCE * seconds:
            before = time.monotonic()
            if poll.poll(500):
                return True
            cpu, ready = _activity(pid)
            if not ready and cpu <= computed + 0.02:
                idle += time.monotonic() - before
            computed = max(cpu, computed)
            if computed >= seconds or idle >= seconds:
                return False
        return False
    finally:
        os.close(descriptor)


def _activity(group: int) -> tuple[float, bool]:
    """Processor time of a process and of those that it started, and whether one of them would compute if it could."""
    ticks, ready = 0, False
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            with open(f"/proc/{entry.name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            if int(fields[2]) != group:
                continue
            states = [
                _state(f"/proc/{entry.name}/task/{task}/stat")
                for task in os.listdir(f"/proc/{entry.name}/task")
            ]
        except OSError:
            continue  # it has ended
        else:
            ticks += sum(map(int, fields[11:15]))  # its own, and that of the children it has waited for
            ready = ready or not {"R", "D"}.isdisjoint(
                states
            )  # runs or waits for a processor; waits for a disk
    return ticks / os.sysconf("SC_CLK_TCK"), ready


def _state(path: str) -> str:
    with open(path) as file:
        return file.read().rpartition(")")[2].split()[0]
