"""What was read of a network? Memories with their states, what joins these, and what is proven of them. Data only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from depthscope.probes.reading.branches import Branch
from depthscope.probes.reading.graph import TracedValue
from depthscope.probes.reading.numbers import Numbers

PROVEN = "proven"


@dataclass(frozen=True)
class StateReading:
    """One residual state."""

    layer: int  # of the block, -1 before the first
    site: str  # embed, pre, mid, post
    values: tuple[int, ...]  # the numbers in the graph of what it consists of


@dataclass
class BranchReading:
    """What one branch reads and writes between two states; weights are (tokens, to, from, features or 1)."""

    branch: Branch
    write: torch.Tensor  # H_post: to each stream, from each of its outputs
    out: torch.Tensor  # what it gave, (tokens, its outputs, features)
    # H_pre: to each of its inputs, from each stream, or each source over depth; None where that is known of no input
    read: torch.Tensor | None = None
    taken: torch.Tensor | None = None  # what it read of several streams, (tokens, inputs, features)
    reads: Sequence[tuple[TracedValue, torch.Tensor]] = ()  # each value that it reads, with its weights


@dataclass
class ConnectionReading:
    """What joins two states: X' = H_res X + Σ h_post y + constant; weights are (tokens, to, from, features or 1).

    Over depth X are the sources: the first state and the outputs of all earlier branches.
    """

    depth_in: int
    h_res: torch.Tensor
    branches: list[BranchReading]
    constant: torch.Tensor | None
    start: list[TracedValue]  # the state, after the norm with which the step begins
    target: list[TracedValue]  # the next state, before its last norm
    before_sum: Sequence[str] = ()  # norms and activations of the whole state with which the step begins
    after_sum: Sequence[str] = ()  # and with which it ends
    weighs: bool = True  # whether an operation scales or mixes the streams; otherwise h_res is the identity by construction
    error: float = 0.0  # of the recomputed state, relative to its largest number
    # Over depth, of the state before in the sources: (tokens, from, features or 1)
    state: torch.Tensor | None = None

    @property
    def depth_out(self) -> int:
        """The depth of the next state."""
        return self.depth_in + 1


@dataclass(frozen=True)
class MemoryReading:
    """One residual memory, from its first state to the one that the head reads."""

    name: str
    states: tuple[StateReading, ...]
    connections: tuple[ConnectionReading, ...]
    num_streams: int
    over_depth: bool
    # How many streams every step makes of its state and merges again; 0 where some step makes none.
    inner_streams: int
    token_shape: tuple[int, ...]
    root: int  # the number of its first value
    shape: tuple[int, ...]  # of one stream of that
    feature_axis: int
    # Where elements of the first value are, in every value that has some
    carried: Mapping[int, Numbers] = field(repr=False)
    # The numbers of the values that are carried to its last state, and to what branches read
    held: frozenset[int] = field(repr=False)
    # Names of those that work between its first and last state
    parameters: frozenset[str] = field(repr=False)
    proof: str  # "proven", or "unproven: why"
    error: float
    share: float  # of its branches, of the parameters that reach the output
    # Where the head's sum of its last state and earlier ones ends, if the head alone reads one
    mixed_for_head: str = ""
    # In which it is carried or branches' outputs are scaled, but for that of its first value
    casts: tuple[torch.dtype, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether each state is one stream, made of the one before."""
        return self.num_streams == 1 and not self.over_depth

    @property
    def branches(self) -> list[Branch]:
        """All branches, in order."""
        return [of.branch for connection in self.connections for of in connection.branches]

    @property
    def units(self) -> set[int]:
        """The calls of its blocks."""
        return {branch.unit for branch in self.branches} - {-1}

    @property
    def end(self) -> int:
        """The number of the last value of its last state."""
        return self.states[-1].values[-1]

    @property
    def is_proven(self) -> bool:
        """Whether every state and read was recomputed from the parts, and the choice of the states is complete."""
        return self.proof == PROVEN
