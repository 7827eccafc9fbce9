"""How do processes exchange numbers without touching the training's own exchange? By connections of their own.

The connections are gloo's, over main memory, also where the training uses NCCL: what is exchanged is read back from the device
anyway, nothing can come between the training's collectives on the device, and where a process does not come, a wait of ours
ends by itself. NCCL's watchdog would end the training instead.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.training.ranks.group import DataGroup

POLL = 0.05  # seconds between two looks for the first process
_used: dict[str, int] = {}  # the last connections of this process with some others
_leaving: list[Any] = []  # connections that were closed last: the others may still read from them


class LostError(CaptureError):
    """A process did not come to a collective, or left; nothing can be exchanged any more."""


class Channel:
    """The connections between the processes of a data group. Every method is collective.

    ``group``: who.
    ``timeout``: seconds that a process waits for the others.
    Raises LostError: Where not all of them come.
    """

    def __init__(self, group: DataGroup, timeout: float) -> None:
        self._group, self._timeout = group, timedelta(seconds=timeout)
        self._connections: Any = None
        _leaving.clear()
        members = hashlib.sha256(repr(group.ranks).encode()).hexdigest()[:16]
        # Not by new_group, whose names and counts are those of the training's groups: were it called by one process alone,
        # the next group of the training would not be found.
        distributed = torch.distributed
        self._store = distributed.PrefixStore(
            f"depthscope/{members}", distributed.distributed_c10d._get_default_store()
        )
        self._number = 0
        try:
            self._number = self._announced(members)
            store = distributed.PrefixStore(str(self._number), self._store)
            self._connections = distributed.ProcessGroupGloo(store, group.rank, group.size, self._timeout)
            self._wait(self._connections.allreduce([torch.zeros(1)]))
        except RuntimeError as error:
            raise self._lost(error) from None

    def _announced(self, members: str) -> int:
        """The number of these connections, which the first process makes and the others wait for."""
        if self._group.rank == 0:
            number = int(self._store.add("number", 1))
            self._store.set("announced", str(number))
            return number
        ends = time.monotonic() + self._timeout.total_seconds()
        while time.monotonic() < ends:
            if self._store.check(["announced"]):
                number = int(self._store.get("announced"))
                # Not those of an earlier recorder, or of one that the first process opened alone.
                if number > _used.get(members, 0) and not self._store.check([f"{number}/ended"]):
                    _used[members] = number
                    return number
            time.sleep(POLL)
        raise RuntimeError("the first of them did not open its recorder")

    @property
    def is_open(self) -> bool:
        """Whether anything can be exchanged."""
        return self._connections is not None

    def close(self) -> None:
        """Close the connections; calling it twice is fine."""
        if self._group.rank == 0 and self._number:
            with suppress(RuntimeError):  # the store may have ended with the training
                self._store.set(f"{self._number}/ended", "")
        _leaving.append(self._connections)
        self._connections, self._number = None, 0

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """Add a vector of every process, in place."""
        return self._reduced(numbers, torch.distributed.ReduceOp.SUM)

    def maximum(self, numbers: torch.Tensor) -> torch.Tensor:
        """The largest of every process, entry by entry, in place; there may be no NaN."""
        return self._reduced(numbers, torch.distributed.ReduceOp.MAX)

    def sum_on_first(self, numbers: torch.Tensor) -> torch.Tensor:
        """Add a vector of every process, in place, on the first one; what the others have then means nothing."""
        options = torch.distributed.ReduceOptions()
        options.rootRank, options.reduceOp = 0, torch.distributed.ReduceOp.SUM
        return self._exchange("reduce", numbers, options)

    def texts(self, text: str) -> list[str]:
        """A text of every process, in their order; two collectives, for what happens once."""
        encoded = (
            torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
            if text
            else torch.empty(0, dtype=torch.uint8)
        )
        lengths = torch.zeros(self._group.size, dtype=torch.int64)
        lengths[self._group.rank] = len(encoded)
        ends = self.sum(lengths).cumsum(0).tolist()
        joined = torch.zeros(max(ends[-1], 1), dtype=torch.uint8)
        began = ends[self._group.rank] - len(encoded)
        joined[began : began + len(encoded)] = encoded
        whole = bytes(self.sum(joined).tolist())
        return [whole[begin:end].decode() for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _reduced(self, numbers: torch.Tensor, operation: Any) -> torch.Tensor:
        options = torch.distributed.AllreduceOptions()
        options.reduceOp = operation
        return self._exchange("allreduce", numbers, options)

    def _exchange(self, name: str, numbers: torch.Tensor, options: Any) -> torch.Tensor:
        if self._connections is None:
            raise LostError("the connections to the other processes are closed")
        try:
            self._wait(getattr(self._connections, name)([numbers], options))
        except RuntimeError as error:
            raise self._lost(error) from None
        return numbers

    def _wait(self, work: Any) -> None:
        work.wait(self._timeout)

    def _lost(self, error: Exception) -> LostError:
        self.close()
        reason = str(error).partition("\n")[0]
        return LostError(
            f"not all of the {self._group.size} processes answered within {self._timeout.total_seconds():g} s ({reason}): "
            "every process has to open the recorder and to call recorder.step() equally often. The training goes on, and "
            "nothing is measured any more"
        )
