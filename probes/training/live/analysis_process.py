"""How are live rows completed beside the training? By a second process, over shared memory; dropped where it is behind.

The training copies what a row needs into one of two slots, anonymous files in memory, and goes on. The other process computes
ranks, similarities, products and findings and leaves the row in the same slot. Nothing is left when either of them is killed:
the slots have no name, and the other process ends with its parent. It writes no file: the training is the store's only writer.
"""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any, NamedTuple

import torch

from depthscope.diagnostics import Finding
from depthscope.probes.statistics.token_sums import TokenSums
from depthscope.probes.training.live.findings import findings_of
from depthscope.probes.training.live.row import Begun, LiveMetrics, LiveRow
from depthscope.probes.training.live.row_input import RowInput

SLOTS = 2
LENGTH = struct.Struct("<q")  # of what the process is started with
TASK = struct.Struct("<iI")  # number of the slot, and how many sizes follow: of the header and of every array
ANSWER = struct.Struct("<iqq")  # number of the slot, where in it the row begins, and its bytes
READY, FAILED = -1, -1  # in place of a slot, and of a size
WORKER = "depthscope.probes.training.live.analysis_worker"
PATIENCE = 60.0  # seconds that the end of a training waits for its last rows


class Completed(NamedTuple):
    """What came of one row: what could not be computed is None, and the error says why."""

    step: int
    row: LiveRow | None
    findings: list[Finding] | None
    error: Exception | None


def is_possible() -> bool:
    """Whether this system hands open files to a process that is started."""
    return os.name == "posix"


def has_free_cores() -> bool:
    """Whether the process may use more cores than torch has threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores > torch.get_num_threads()


def in_slot(descriptor: int, header: bytes, buffers: Sequence[memoryview]) -> list[int]:
    """Write the input of a row to a slot; returns the sizes of its parts."""
    end = 0
    parts: list[bytes | memoryview] = [header, *buffers]
    for part in parts:
        write_at(descriptor, part, end)
        end += len(part)
    return [len(header), *(len(buffer) for buffer in buffers)]


def write_at(descriptor: int, content: bytes | memoryview, start: int) -> None:
    """Write bytes to a slot."""
    left = memoryview(content)
    while left:
        written = os.pwrite(descriptor, left, start)
        left, start = left[written:], start + written


def from_slot(descriptor: int, sizes: Sequence[int]) -> RowInput:
    """The input of a row that `in_slot` wrote."""
    content = memoryview(bytearray(read_at(descriptor, 0, sum(sizes))))
    parts, start = [], 0
    for size in sizes:
        parts.append(content[start : start + size])
        start += size
    return RowInput.unpickled(bytes(parts[0]), parts[1:])


def read_at(descriptor: int, start: int, size: int) -> bytes:
    """Bytes of a slot."""
    parts = []
    while size:
        part = os.pread(descriptor, size, start)
        if not part:
            raise EOFError("a slot is shorter than what was written to it")
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return b"".join(parts)


def completed(
    metrics: LiveMetrics, attrs: dict[str, dict[str, Any]], step: int, given: RowInput
) -> Completed:
    """A row, and all findings about it."""
    row = None
    try:
        row = metrics.complete(step, given.sums, given.begun)
        return Completed(step, row, findings_of(row, attrs), None)
    except Exception as error:
        return Completed(step, row, None, error)


class _OnItsWay(NamedTuple):
    """A row in a slot, and the sizes of the parts of its input."""

    slot: int
    step: int
    sizes: list[int]


class AnalysisProcess:
    """A process that completes rows, from the start of one training to its end.

    ``metrics``: what a row has; its groups are known.
    ``attrs``: of its groups.
    ``dropped``: steps whose rows were not completed, since two earlier ones were not yet.
    ``ended``: why the process ended before its time; empty while it runs.
    """

    def __init__(self, metrics: LiveMetrics, attrs: dict[str, dict[str, Any]]) -> None:
        self.dropped: list[int] = []
        self.ended = ""
        self._metrics, self._attrs = metrics, attrs
        self._slots = [_anonymous_file() for _ in range(SLOTS)]
        self._waiting: deque[_OnItsWay] = deque()
        self._is_ready = False
        self._heard = b""  # the beginning of an answer
        self._process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        files = [slot.fileno() for slot in self._slots]
        start = pickle.dumps((os.getpid(), files, self._metrics.names, self._metrics.groups, self._attrs))
        # Modules are found where they are found here. One thread, and no accelerator.
        surroundings = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
            "CUDA_VISIBLE_DEVICES": "",
        }
        # A program of its own, and not a fork: other threads of a training may hold locks at this moment.
        process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=files,
            env=surroundings,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        try:
            process.stdin.write(LENGTH.pack(len(start)) + start)
            process.stdin.flush()
        except OSError as error:
            self.ended = f"it took nothing ({error})"
        return process

    @property
    def is_starting(self) -> bool:
        """Whether it has not said yet that it has started, which takes some seconds."""
        if not self._is_ready:
            self._listen()
        return not self._is_ready

    @property
    def awaited(self) -> set[int]:
        """Steps whose rows are on their way."""
        return {row.step for row in self._waiting}

    def hand_over(self, step: int, sums: Sequence[TokenSums], begun: list[Begun]) -> None:
        """Have a row completed; it is dropped where both slots are in use."""
        free = [number for number in range(SLOTS) if all(row.slot != number for row in self._waiting)]
        if not free:
            self.dropped.append(step)
            return
        descriptor = self._slots[free[0]].fileno()
        sizes = in_slot(descriptor, *RowInput(step, list(sums), begun).pickled())
        self._waiting.append(_OnItsWay(free[0], step, sizes))
        assert self._process.stdin is not None
        try:
            # At most two tasks wait, of some kilobytes each, which a pipe takes without waiting.
            self._process.stdin.write(TASK.pack(free[0], len(sizes)) + struct.pack(f"<{len(sizes)}q", *sizes))
            self._process.stdin.flush()
        except OSError as error:
            self.ended = f"it took nothing ({error})"

    def arrived(self) -> list[Completed]:
        """The rows that were completed since this was asked last; of a process that ended, all that waited for it."""
        found = [self._row_of(*answer) for answer in self._listen()]
        if self.ended:
            while self._waiting:
                row = self._waiting.popleft()
                given = from_slot(self._slots[row.slot].fileno(), row.sizes)
                found.append(completed(self._metrics, self._attrs, row.step, given))
        return found

    def _row_of(self, slot: int, start: int, size: int) -> Completed:
        row = self._waiting.popleft()
        assert row.slot == slot
        descriptor = self._slots[slot].fileno()
        if size == FAILED:  # such as a row that cannot be pickled: in the training it need not be
            return completed(self._metrics, self._attrs, row.step, from_slot(descriptor, row.sizes))
        found: Completed = pickle.loads(read_at(descriptor, start, size))
        return found

    def _listen(self) -> list[tuple[int, int, int]]:
        """The answers that have come, without waiting for more."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while not self.ended:
            try:
                heard = os.read(descriptor, 1 << 16)
            except BlockingIOError:
                break
            if not heard:
                self.ended = f"its exit code is {self._process.wait()}"
            self._heard += heard
        answers = []
        while len(self._heard) >= ANSWER.size:
            answer = ANSWER.unpack_from(self._heard)
            self._heard = self._heard[ANSWER.size :]
            if answer[0] == READY:
                self._is_ready = True
            else:
                answers.append(answer)
        return answers

    def finish(self) -> list[Completed]:
        """End the process, and return its last rows."""
        until = time.monotonic() + PATIENCE
        found = self.arrived()
        while self._waiting and not self.ended:
            if time.monotonic() > until:
                self.ended = f"it did not answer for {PATIENCE:g} s"
                self._process.kill()
            time.sleep(0.005)
            found += self.arrived()
        self.close()
        return found

    def close(self) -> None:
        """End the process, and forget what it was to do."""
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # of one that has died
                if pipe is not None:
                    pipe.close()
        self._process.kill()
        self._process.wait()
        for slot in self._slots:
            slot.close()

    def forget(self) -> None:
        """In a child process: the other one belongs to the parent."""
        self._waiting.clear()
        self._process.returncode = 0  # so that nobody waits for it here
        for slot in self._slots:
            slot.close()


def _anonymous_file() -> IO[bytes]:
    """A file in memory without a name, which ends with the last process that has it open."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("depthscope"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)
