"""What was read of a network? Memories with their states, what joins these, and what is proven of them. Data only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from depthscope.probes.reading.graph import ValuePlace
from depthscope.probes.reading.numbers import Numbers

PROVEN = "proven"


@dataclass(frozen=True)
class StateReading:
    """One residual state."""

    layer: int  # of the block, -1 before the first
    site: str  # embed, pre, mid, post
    values: tuple[int, ...]  # the numbers in the graph of what it consists of
    array: Callable[[], torch.Tensor] = field(repr=False)  # makes ``value``, as long as the forward is held

    @property
    def value(self) -> torch.Tensor:
        """(tokens, streams, features)."""
        return self.array()


@dataclass(frozen=True)
class BranchReading:
    """One branch: where it reads and what it writes.

    ``parts`` are (tokens, …) arrays: ``read`` (H_pre, of each of its inputs and each stream) and ``write`` (H_post, of each
    stream and each of its outputs), or ``read_gate`` and ``branch_gate`` where these differ along the features; ``out`` what
    it gave, ``in`` what it read of several streams.
    """

    path: str
    kind: str  # attn, mlp, or the name of its module
    layer: int
    reads: tuple[ValuePlace, ...]
    unit: int  # the outermost call, inside of that around all branches, in which it runs; -1 where it runs in none
    # Numbers of values: the source, and what is moved or scaled of it up to what is added
    way: tuple[int, ...]
    # Where the elements of the memory's first value are, to which each of these values is added.
    numbers: tuple[Numbers, ...] = field(repr=False)
    parts: Mapping[str, torch.Tensor] = field(repr=False)


@dataclass(frozen=True)
class ConnectionReading:
    """What joins two states: X' = H_res X + Σ h_post y + constant.

    ``parts``: ``h_res`` (tokens, streams out, streams in), or ``residual_gate`` (tokens, features) where the weight of a
    single stream differs along the features; ``depth_read`` and ``depth_carry`` (tokens, sources) over depth; ``constant``.
    """

    depth_in: int
    depth_out: int
    parts: Mapping[str, torch.Tensor] = field(repr=False)
    branches: tuple[BranchReading, ...]
    # Norms and activations of the whole state at the begin and the end of the step
    functions: tuple[str, ...]
    error: float  # of the recomputed state, relative to its largest number
    weighs: bool = True  # whether an operation scales or mixes the streams; otherwise h_res is the identity by construction


@dataclass(frozen=True)
class MemoryReading:
    """One residual memory, from its first state to the one that the head reads."""

    name: str
    states: tuple[StateReading, ...]
    connections: tuple[ConnectionReading, ...]
    num_streams: int
    over_depth: bool
    inner_streams: (
        int  # how many streams every step makes of its state and merges again; 0 where some step makes none
    )
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
    # Shares of the parameters that reach the output: before, branches, head, elsewhere
    weights: Mapping[str, float]
    # Where the head's sum of its last state and earlier ones ends, if the head alone reads one
    mixed_for_head: str = ""
    # In which it is carried or branches' outputs are scaled, but for that of its first value
    casts: tuple[torch.dtype, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether each state is one stream, made of the one before."""
        return self.num_streams == 1 and not self.over_depth

    @property
    def branches(self) -> list[BranchReading]:
        """All branches, in order."""
        return [branch for connection in self.connections for branch in connection.branches]

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


@dataclass(frozen=True)
class NetworkReading:
    """The memories of one forward, the model's first; none where ``refused`` has the reason."""

    memories: tuple[MemoryReading, ...]
    left_out: Mapping[str, str]  # memories that were found and are not described, with the reasons
    refused: str = ""
