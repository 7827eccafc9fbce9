"""What was read of a network? Memories with their states, what joins these, and what is proven of them. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from depthscope.probes.reading.graph import ValuePlace

PROVEN = "proven"


@dataclass(frozen=True)
class StateReading:
    """One residual state: ``value`` is (tokens, streams, features)."""

    layer: int  # of the block, -1 before the first
    site: str  # embed, pre, mid, post
    module: str  # in whose call it was made
    places: tuple[ValuePlace, ...]  # of the values that it consists of
    value: torch.Tensor = field(repr=False)


@dataclass(frozen=True)
class BranchReading:
    """One branch: where it reads and what it writes.

    ``parts`` are (tokens, …) arrays: ``h_pre`` and ``h_post`` of one stream each, ``read`` and ``write`` where a branch has
    several, ``branch_gate`` where its weight differs along the features, ``out`` what it gave.
    """

    path: str
    kind: str  # attn, mlp, or the name of its module
    layer: int
    source: ValuePlace
    reads: tuple[ValuePlace, ...]
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
    functions: tuple[str, ...]  # norms and activations of the whole state at the end of the step
    error: float  # of the recomputed state, relative to its largest number


@dataclass(frozen=True)
class MemoryReading:
    """One residual memory, from its first state to the one that the head reads."""

    name: str
    states: tuple[StateReading, ...]
    connections: tuple[ConnectionReading, ...]
    num_streams: int
    over_depth: bool
    token_shape: tuple[int, ...]
    proof: str  # "proven", or "unproven: why"
    error: float
    weights: Mapping[
        str, float
    ]  # shares of the parameters that reach the output: before, branches, head, elsewhere

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
