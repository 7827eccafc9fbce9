"""What does the process beside a training do? It completes rows as they come, and ends with its parent."""

from __future__ import annotations

import os
import pickle
import select
import struct
import sys
from typing import Any

NICER = 10  # the training goes first
LOOK_FOR_PARENT = 1.0  # seconds


def main() -> None:
    """Read what is to be done from the standard input, and answer on the standard output, until the parent has gone."""
    os.nice(NICER)
    tasks, answers = 0, os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    import torch

    from depthscope.probes.training.live import analysis_process as shared
    from depthscope.probes.training.live.row import LiveMetrics

    torch.set_num_threads(1)
    read = _Pipe(tasks)
    parent, files, names, groups, attrs = pickle.loads(
        read(shared.LENGTH.unpack(read(shared.LENGTH.size))[0])
    )
    read.parent = parent
    metrics = LiveMetrics(None, names)
    metrics.groups = groups
    _answer(answers, shared.ANSWER.pack(shared.READY, 0, 0))
    while True:
        slot, count = shared.TASK.unpack(read(shared.TASK.size))
        sizes = struct.unpack(f"<{count}q", read(8 * count))
        try:
            given = shared.from_slot(files[slot], sizes)
            row = pickle.dumps(shared.completed(metrics, attrs, given.step, given), protocol=5)
            # After the input, which the training needs again where this process dies.
            shared.write_at(files[slot], row, sum(sizes))
        except Exception:  # the training tries it itself, and reports what it meets
            _answer(answers, shared.ANSWER.pack(slot, 0, shared.FAILED))
        else:
            _answer(answers, shared.ANSWER.pack(slot, sum(sizes), len(row)))


class _Pipe:
    """Reads whole pieces; the process ends where there are no more, or where its parent has died."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.parent = os.getppid()

    def __call__(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            # Another process may still hold the pipe open, such as a worker of a loader that outlives the training.
            if os.getppid() != self.parent:
                sys.exit(0)
            if select.select([self._descriptor], [], [], LOOK_FOR_PARENT)[0]:
                part = os.read(self._descriptor, size - len(found))
                if not part:
                    sys.exit(0)
                found += part
        return found


def _answer(descriptor: int, content: Any) -> None:
    try:
        os.write(descriptor, content)
    except OSError:
        sys.exit(0)


if __name__ == "__main__":
    main()
