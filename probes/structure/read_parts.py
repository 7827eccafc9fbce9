"""What are the coefficients of one forward, by the reading of its memory? Of stream connections, or of sums over depth."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from depthscope.probes.connections.proof import DepthWeights, Parts, StreamConnectionError
from depthscope.probes.reading.description import BranchReading, ConnectionReading, MemoryReading
from depthscope.probes.reading.graph import TracedValue
from depthscope.probes.reading.read import Rereading
from depthscope.probes.structure.read_layout import token_order, tokens_of

# Of a connection, and what its branch gave, where that is apart
ConnectionWeights = tuple[Parts | DepthWeights, torch.Tensor | None]


class ReadStructure:
    """How the memory of a model with streams, or with sums over depth, is read in every forward.

    Parameters
    ----------
    rereading : Rereading
        Of the first forward.
    memory : MemoryReading
        That is read.
    first_layout : str
        Of its first state.
    """

    def __init__(self, rereading: Rereading, memory: MemoryReading, first_layout: str):
        self.rereading, self._layout, self._num_streams = rereading, first_layout, memory.num_streams
        self.first: MemoryReading | None = memory
        self._order: tuple[Any, int, torch.Tensor] | None = (
            None  # of tokens, for a memory's numbers and a batch size
        )
        self.casts = memory.casts
        self.mixes = any(connection.weighs for connection in self.first.connections)
        h_res = None if memory.over_depth else memory.connections[0].parts.get("h_res")
        # Whether one tensor is every stream of the first state: of the first matrix only the sums of its rows are known.
        self.is_first_shared = h_res is not None and h_res.shape[-1] < h_res.shape[-2]
        # That, and those that read or write other numbers of streams at once than most: their step is one between connections.
        self.left_out = frozenset({0} if self.is_first_shared else ())

    def without_other_views(self, weights: Mapping[int, ConnectionWeights]) -> dict[int, ConnectionWeights]:
        """The connections but for those whose branches read or write other numbers of streams at once than those of most."""
        views = {
            number: (of.branch_in.shape[-2], of.write.shape[-1])
            for number, (of, _) in weights.items()
            if isinstance(of, Parts)
        }
        usual = Counter(views.values()).most_common(1)[0][0] if views else None
        self.left_out |= {number for number, of in views.items() if of != usual}
        return {number: of for number, of in weights.items() if number not in self.left_out}

    def keep(self) -> None:
        """Let go of the first forward."""
        if self.first is not None:
            self.rereading.keep(self.first)
        self.first = None

    def weights(self, memory: MemoryReading, batch_size: int) -> list[ConnectionWeights]:
        """The coefficients of every connection.

        Raises StreamConnectionError, LayoutError: Where they have no place in these.
        """
        numbers = memory.states[0].numbers[0]
        if self._order is None or self._order[0] is not numbers or self._order[1] != batch_size:
            found = token_order(memory, numbers, self._layout, batch_size, self._num_streams)
            self._order = numbers, batch_size, found
        order = self._order[2]
        if memory.over_depth:
            return list(depth_weights(memory, order))
        parts = (stream_parts(connection, order, mixes=self.mixes) for connection in self.connections(memory))
        return [(of, None) for of in parts]

    def family(
        self, memory: MemoryReading, weights: Sequence[Parts | DepthWeights], *, is_sinkhorn: bool
    ) -> str:
        """What a model of these weights is called.

        ``is_sinkhorn``: whether Sinkhorn's iteration makes every matrix.
        """
        if memory.over_depth:
            return depth_family([of for of in weights if isinstance(of, DepthWeights)])
        if not self.mixes and any(of.read is None for of in weights if isinstance(of, Parts)):
            return "gated"
        return ("mhc" if is_sinkhorn else "hc") if self.mixes else "independent_hc"

    def connections(self, memory: MemoryReading) -> list[ConnectionReading]:
        """The connections with streams, of which `weights` are."""
        joined = (connection for connection in memory.connections if connection.branches)
        return [connection for number, connection in enumerate(joined) if number not in self.left_out]

    def token_norms(
        self, memory: MemoryReading, tensors: Sequence[torch.Tensor], values: Sequence[TracedValue]
    ) -> torch.Tensor:
        """The norms (B, T) of what has the elements of some values of a memory, over streams and features."""
        assert self._order is not None
        squares = torch.zeros(math.prod(memory.token_shape) or 1, dtype=torch.float64)
        for tensor, value in zip(tensors, values, strict=True):
            flat, at = (
                tensor.detach().flatten().cpu().double(),
                tokens_of(memory, memory.carried[value.number]),
            )
            squares.index_add_(0, at[at >= 0], flat[at >= 0].square())
        return squares.sqrt()[self._order[2]]


def stream_parts(connection: ConnectionReading, order: torch.Tensor, *, mixes: bool) -> Parts:
    """The parts of a connection with streams.

    ``order``: which of the reading's tokens each (sequence, token) is.
    ``mixes``: whether some connection of the model has a matrix; otherwise it is left out.
    Raises StreamConnectionError: Where its weights are no scalars, or what its branch reads has another order than the state.
    """
    if "h_res" not in connection.parts:
        raise StreamConnectionError(
            "H_res differs between the features of a stream: it is not a matrix over streams"
        )
    if connection.functions:
        names = ", ".join(connection.functions)
        raise StreamConnectionError(
            f"the streams go through {names} after the sum, which a connection has no part for"
        )
    mix = connection.parts["h_res"][order]
    branches = connection.branches
    constant = connection.parts.get("constant")
    return Parts(
        mix=mix if mixes else None,
        read=_reads(branches, order),
        write=_writes(branches, order, mix),
        branch_in=_branch_tensors(branches, order, "in"),
        branch_out=_branch_tensors(branches, order, "out"),
        constant=None if constant is None else constant[order],
    )


def _reads(branches: Sequence[BranchReading], order: torch.Tensor) -> torch.Tensor | None:
    """H_pre, (B, T, V, N); None where a branch reads by gates per feature."""
    if not branches or any("read" not in branch.parts for branch in branches):
        return None
    return torch.cat([branch.parts["read"][order] for branch in branches], -2)


def _writes(branches: Sequence[BranchReading], order: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """H_post, (B, T, N, V); zero where nothing is written."""
    for branch in branches:
        if "write" not in branch.parts:
            raise StreamConnectionError(f"H_post of {branch.path} differs between the features of a stream")
    columns = [branch.parts["write"][order] for branch in branches]
    return torch.cat(columns, -1) if columns else torch.zeros_like(mix[..., :1])


def _branch_tensors(branches: Sequence[BranchReading], order: torch.Tensor, name: str) -> torch.Tensor:
    missing = [branch.path or "a branch" for branch in branches if name not in branch.parts]
    if missing or not branches:
        what = "takes" if name == "in" else "gives"
        raise StreamConnectionError(
            f"what {missing[0] if missing else 'no branch'} {what} has not the tokens of the state"
        )
    return torch.cat([branch.parts[name][order] for branch in branches], -2)


def depth_weights(memory: MemoryReading, order: torch.Tensor) -> list[tuple[DepthWeights, torch.Tensor]]:
    """The weights over depth of every connection, and what its branch gave, (B, T, D).

    The first source is the first state.
    Raises StreamConnectionError: Where a state is not one branch's after the one before, or a weight is no scalar.
    """
    begin = memory.connections[0].parts.get("state")
    if begin is None:
        raise StreamConnectionError("the weights over depth differ between the features of the first state")
    if bool(begin[:, 1:].any()) or bool((begin[:, 0] != 1).any()):
        raise StreamConnectionError("the first state is not the embedding alone")
    found = []
    for connection in memory.connections:
        if not connection.branches:  # a mixture is read of what a block gave and of earlier outputs
            continue
        if len(connection.branches) != 1:
            raise StreamConnectionError(
                f"{len(connection.branches)} branches lie between two states of sums over depth; expected one"
            )
        (branch,) = connection.branches
        if "constant" in connection.parts or not {"write", "out"} <= branch.parts.keys():
            raise StreamConnectionError(f"what {branch.path or 'a branch'} adds has no scalar weight")
        if "depth_read_gate" in branch.parts or not {"depth_read", "depth_carry"} <= connection.parts.keys():
            raise StreamConnectionError(
                f"the weights over depth differ between the features at {branch.path or 'a branch'}"
            )
        several, carry = branch.parts.get("depth_read"), connection.parts["depth_carry"]
        read = connection.parts["depth_read"].unsqueeze(-2) if several is None else several
        scale = branch.parts["write"].flatten(1).mean(-1)
        weights_of = DepthWeights(read[order].float(), carry[order].float(), scale[order].float())
        found.append((weights_of, branch.parts["out"][order].squeeze(-2)))
    return found


def depth_family(weights: Sequence[DepthWeights]) -> str:
    """The family of a model with weights over depth: the same at every token where they are learned, others by attention."""
    rows = [torch.cat([of.read.flatten(2), of.carry, of.scale.unsqueeze(-1)], -1) for of in weights]
    if all(bool((row == row[:1, :1]).all()) for row in rows):
        ones = all(
            bool((of.read[..., : n + 1] == 1).all() and (of.carry[..., : n + 1] == 1).all())
            for n, of in enumerate(weights)
        )
        return "residual" if ones and all(bool((of.scale == 1).all()) for of in weights) else "depth_history"
    return "depth_attention"
