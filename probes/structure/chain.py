"""A residual chain: which calls show its states, and which connections join them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from depthscope.diagnostics.errors import InputError
from depthscope.probes.reading.description import MemoryReading
from depthscope.probes.reading.graph import Graph, ValuePlace

PLAIN = ("add", "normed")  # the styles of a plain block: state + branch, and a norm of that sum
NO_FINAL_NORM = "no norm takes the last state"
READ = "read"  # the style of a connection with streams whose weights the operations of each forward show
DEPTH = "depth"  # the style of a branch that reads a sum over depth


class ChainError(InputError):
    """No chain of blocks was found, or the named layers do not form one."""


@dataclass(frozen=True)
class HookPoint:
    """What shows one state of a chain: the input or the output of one call of a module, or an operation inside of it."""

    path: str
    index: int  # of the call, among the module's calls in one forward
    at: str  # "input", "output", or "operation" where only the trace of the forward shows it
    layer: int
    site: str
    module: str  # the module that computed the state
    number: int  # of the value that it shows, in the graph of the forward that was read
    shape: tuple[int, ...]  # of the state
    # Which of the call's floating tensors; the k-th operation of its name that the call runs itself.
    item: int = 0
    operation: str = ""  # its name
    result: int = 0  # which of its results
    layout: str = ""  # where it is another one than the chain's
    streams: tuple[HookPoint, ...] = ()  # what shows each stream, where each is a tensor of its own
    # Whether a branch that is written into this state read the tensor already: it has the gradient of that, too.
    is_read_before: bool = False
    # Whether a function of autograd makes the tensor and reads it itself: it has a part of the gradient alone.
    is_read_inside: bool = False

    @property
    def place(self) -> ValuePlace:
        """Where the operation is that shows a state which no call shows."""
        return ValuePlace(self.path, self.index, self.operation, self.item, self.result)

    def moment_in(self, graph: Graph) -> float:
        """When it shows its state in the forward that was read: with an operation, or as a call begins or ends."""
        if self.at == "operation":
            return self.number
        made = graph.made_in.get(graph.call_of(self.path, self.index))
        if made is None:  # it did not end
            return math.inf
        return made.start - 0.5 if self.at == "input" else made.stop - 0.5


@dataclass(frozen=True)
class Connection:
    """What joins two depths: the call that mixes or adds, and the call whose output is the branch's."""

    path: str
    layer: int
    branch: str
    branch_path: str | None
    branch_index: int
    style: str
    depth_in: int
    depth_out: int
    parameters: tuple[str, ...] = ()  # names of those that its coefficients are computed from
    is_sinkhorn: bool = False  # whether Sinkhorn's iteration makes its matrix
    layout: str = ""  # of what the branch of a plain block gives


@dataclass(frozen=True)
class Chain:
    """A residual chain: what shows its states, in depth order, and its connections where they are known."""

    name: str
    points: tuple[HookPoint, ...]
    connections: tuple[Connection, ...]
    blocks: tuple[str, ...]
    block_class: str
    layout: str = ""  # the axes of its states; empty where these have no order that a layout can name
    final: HookPoint | None = None  # after the last norm
    without_final: str = NO_FINAL_NORM  # why there is none
    history: bool = False  # connected to earlier depths, not to streams
    family: str = ""  # of a chain with connections over depth, or whose state is scaled at each token
    proof: str = ""  # of a plain chain: "proven", or "unproven: why"
    # Of its stages, while the structure is found; none where calls alone show the states
    memories: tuple[MemoryReading, ...] = field(default=(), repr=False)

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of its states, all in its layout."""
        return [point.shape for point in self.points]

    @property
    def has_streams(self) -> bool:
        """Whether its connections mix or write streams, rather than add branches to one state."""
        return any(connection.style not in (*PLAIN, DEPTH) for connection in self.connections)

    @property
    def over_depth(self) -> bool:
        """Whether its branches read sums over depth, whose weights are known."""
        return any(connection.style == DEPTH for connection in self.connections)


def layer_numbers(calls: Sequence[Any]) -> list[int]:
    """Block numbers of some calls: the first number in their paths where these ascend, else their order."""
    numbers = [int(found.group()) if (found := re.search(r"\d+", call.path)) else -1 for call in calls]
    steps = [b - a for a, b in pairwise(numbers)]
    ascending = numbers and numbers[0] >= 0 and all(step in (0, 1) for step in steps)
    # One number throughout is that of what contains the blocks, as in ``stages.1.blocks``. Of two calls it may well be that
    # of their block, which has one connection before its attention and one before its MLP.
    return numbers if ascending and (any(steps) or len(calls) < 3) else list(range(len(calls)))
