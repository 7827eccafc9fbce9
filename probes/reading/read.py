"""How is a forward read? Memories, branches, states, what joins them, the proof, and names: the one way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from depthscope.probes.reading.branches import Branch, before_norms, branches_of
from depthscope.probes.reading.choice import NO_MEMORY, memories
from depthscope.probes.reading.connections import ConnectionParts, DepthParts, joined_by, over_depth
from depthscope.probes.reading.cuts import Cut, cuts_of, last_read
from depthscope.probes.reading.description import (
    PROVEN,
    BranchReading,
    ConnectionReading,
    MemoryReading,
    NetworkReading,
    StateReading,
)  # fmt: skip
from depthscope.probes.reading.graph import Graph, ReadingError, TracedValue
from depthscope.probes.reading.memory import Memory, without_inner
from depthscope.probes.reading.names import BranchNames, labels, name_of, number_blocks
from depthscope.probes.reading.proof import WeightCoverage, recomputed, recomputed_depth, tolerance
from depthscope.probes.reading.recorder import recorded
from depthscope.probes.reading.states import States


def read_model(model: nn.Module, batch: Any) -> NetworkReading:
    """The reading of one forward of a model, without gradients.

    Parameters
    ----------
    model : Module
        The model.
    batch : object
        What it is called with: a dict is passed as keywords, a tuple as positional arguments.

    Returns
    -------
    NetworkReading
    """
    graph, _ = recorded(model, batch)
    return read_graph(graph)


def read_graph(graph: Graph) -> NetworkReading:
    """The reading of a recorded forward."""
    with torch.no_grad():
        try:
            found = memories(graph)
            _refuse_recurrence(graph, found[0])
            readers = [_Reader(memory, found) for memory in found]
            number_blocks([reader.names for reader in readers])
            done, left_out = [readers[0].reading()], {}
        except ReadingError as error:
            return NetworkReading((), {}, str(error))
        for reader in readers[1:]:
            try:
                done.append(reader.reading())
            except ReadingError as error:
                left_out[reader.name] = str(error)
    return NetworkReading(tuple(done), left_out)


def _refuse_recurrence(graph: Graph, memory: Memory) -> None:
    path = graph.path(memory.root)
    branches = branches_of(memory)
    inside = [v for b in branches for v in (b.source, b.read, *b.writes)]
    if path and all(graph.path(v) == path for v in inside):
        tokens = max((v.numel for v in graph.values if v.name == "embedding"), default=0)
        if 2 * memory.count <= tokens:
            raise ReadingError(
                f"what is carried goes along the tokens inside of {path}, and not along the depth"
            )


class _Reader:
    """The reading of one memory."""

    def __init__(self, memory: Memory, others: Sequence[Memory]):
        self.others = [other for other in others if other is not memory]
        self.memory, self.graph = memory, memory.graph
        self.branches = branches_of(memory)
        if not self.branches:
            raise ReadingError(NO_MEMORY)
        self.names = BranchNames(memory, self.branches)
        self.name = name_of(memory, self.names)

    def reading(self) -> MemoryReading:
        """The memory's description.

        Returns
        -------
        MemoryReading

        Raises
        ------
        ReadingError
            Where its states are none that can be described.
        """
        found = cuts_of(self.memory, self.branches, self.names.layers)
        if found.inner:
            again = _Reader(without_inner(self.memory, found.inner), self.others)
            number_blocks([again.names])
            return again.reading()
        self.states = States(self.memory, self.branches)
        if found.over_depth:
            return self._over_depth(found.cuts)
        parts = []
        for before, after in zip(found.cuts, found.cuts[1:], strict=False):
            of = joined_by(self.states, before, after, self.branches)
            of.error = recomputed(self.states, before, of)
            parts.append(of)
        if any(not branch.reads for of in parts for branch in of.branches):
            return self._over_depth(found.cuts)  # a branch reads an earlier state than the last one
        connections = [self._connection(number, of) for number, of in enumerate(parts)]
        errors = [of.error for of in parts]
        return self._described(found.cuts, connections, errors, over_depth=False)

    def _described(
        self,
        cuts: Sequence[Cut],
        connections: list[ConnectionReading],
        errors: list[float],
        *,
        over_depth: bool,
    ) -> MemoryReading:
        coverage = WeightCoverage(self.memory, self.branches, cuts[-1], self.others)
        worst = max(errors, default=math.inf)
        allowed = tolerance([value for cut in cuts for value in cut])
        why = coverage.why_incomplete() or self._why_unread(over_depth)
        if not worst <= allowed:
            number = next(n for n, error in enumerate(errors) if not error <= allowed)
            why = f"state {number + 1} is off by {errors[number]:.2g} of its largest number when it is made of its parts"
        return MemoryReading(
            name=self.name,
            states=tuple(self._states(cuts, over_depth)),
            connections=tuple(connections),
            num_streams=self.states.num_streams(cuts[-1]),
            over_depth=over_depth,
            token_shape=self.states.token_shape,
            proof=f"unproven: {why}" if why else PROVEN,
            error=worst,
            weights=coverage.shares(),
        )

    def _states(self, cuts: Sequence[Cut], over_depth: bool) -> list[StateReading]:
        sites = labels(self.names, cuts)
        found = []
        for cut, (layer, site) in zip(cuts, sites, strict=True):
            places = tuple(self.graph.place(value) for value in cut)
            value = self.states.array(cut)
            found.append(StateReading(layer, site, self.graph.path(cut[-1]), places, value))
        return found

    def _connection(self, number: int, of: ConnectionParts) -> ConnectionReading:
        parts: dict[str, torch.Tensor] = {}
        if of.h_res.shape[-1] == 1:
            parts["h_res"] = of.h_res[..., 0]
        elif of.h_res.shape[1:3] == (1, 1):
            parts["residual_gate"] = of.h_res[:, 0, 0]
        else:
            parts["h_res_gate"] = of.h_res
        if of.constant is not None:
            parts["constant"] = of.constant
        branches = tuple(self._branch(b.branch, _branch_arrays(b)) for b in of.branches)
        return ConnectionReading(number, number + 1, parts, branches, tuple(of.functions), of.error)

    def _branch(self, branch: Branch, parts: dict[str, torch.Tensor]) -> BranchReading:
        number = next(n for n, other in enumerate(self.branches) if other is branch)
        reads = tuple(self.graph.place(read) for read in branch.reads)
        return BranchReading(
            self.names.paths[number], self.names.kind(number), self.names.layers[number],
            self.graph.place(branch.source), reads, parts,
        )  # fmt: skip

    def _over_depth(self, cuts: Sequence[Cut]) -> MemoryReading:
        last = before_norms(self.memory, last_read(self.memory, self.branches))
        single = all(
            len(cut) == 1 for cut in cuts
        )  # one state at a time, of which branches read earlier ones
        values = [cut[0] for cut in cuts] if single else self._bases(last)
        by_read = not values
        parts = over_depth(self.states, self.branches, values or [*(b.read for b in self.branches), last])
        error = recomputed_depth(self.states, parts)
        pairs = list(pairwise(parts.states))
        connections = [
            self._depth_connection(number, pair, parts, error, by_read) for number, pair in enumerate(pairs)
        ]
        cuts = [[value] for value in parts.states]
        return self._described(cuts, connections, [error] * max(len(pairs), 1), over_depth=True)

    def _depth_connection(
        self,
        number: int,
        pair: tuple[TracedValue, TracedValue],
        parts: DepthParts,
        error: float,
        by_read: bool,
    ) -> ConnectionReading:
        before, after = pair
        new = [
            k for k, branch in enumerate(self.branches)
            if (branch.read is before if by_read else before.number < branch.writes[0].number <= after.number)
        ]  # fmt: skip
        reads = [self.branches[k].read for k in new] or [before]
        carry = _table(parts.weights[after.number]).clone()
        carry[:, [k + 1 for k in new]] = 0
        found = {"depth_read": _table(parts.weights[reads[-1].number]), "depth_carry": carry}
        if bool(parts.constants[after.number].any()):
            found["constant"] = parts.constants[after.number]
        branches = []
        for k in new:
            weight = parts.weights[after.number][k + 1]
            name = "branch_gate" if weight.shape[-1] > 1 else "h_post"
            branches.append(self._branch(self.branches[k], {name: weight}))
        return ConnectionReading(number, number + 1, found, tuple(branches), (), error)

    def _bases(self, last: TracedValue) -> list[TracedValue]:
        """What each branch's output is added to, where these are the states and branches read sums of them; else nothing."""
        if last.number not in {write.number for branch in self.branches for write in branch.writes}:
            return []
        found = []
        for branch in self.branches:
            inside = self.memory.inside(branch.writes[0])
            if len(inside) != 1 or inside[0].number not in self.memory.back([branch.read]):
                return []
            found.append(inside[0])
        return [*found, last] if len(set(found)) == len(found) else []

    def _why_unread(self, over_depth: bool) -> str:
        """Reads that a description has no place for."""
        ways = self.memory.trunk
        for branch in self.branches if over_depth else ():
            mixtures = [read for read in branch.reads_before_norms if read.number not in ways]
            if len(mixtures) > 1:
                path = self.graph.path(branch.source) or "a branch"
                return f"{path} reads {len(mixtures)} mixtures of earlier outputs at once"
        return ""


def _table(row: list[torch.Tensor]) -> torch.Tensor:
    """Weights of sources as (tokens, sources); those of each feature by their mean."""
    return torch.stack([weight.mean(-1) for weight in row], -1)


def _branch_arrays(of: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    write = of.write  # (tokens, streams, streams of the branch, features or 1)
    if write.shape[-1] > 1:
        found["branch_gate"] = write[:, 0, 0] if write.shape[1:3] == (1, 1) else write
    elif write.shape[2] == 1:
        found["h_post"] = write[:, :, 0, 0]
    else:
        found["write"] = write[..., 0]
    if of.out is not None:
        found["out"] = of.out
    matrices = [matrix for _, matrix in of.reads]
    if of.out is not None and of.out.shape[1] > 1 and all(matrix.shape[-1] == 1 for matrix in matrices):
        found["read"] = torch.cat([matrix[..., 0] for matrix in matrices], 1)
    elif matrices and matrices[-1].shape[-1] > 1:
        found["read_gate"] = matrices[-1]
    elif matrices:
        found["h_pre" if matrices[-1].shape[1] == 1 else "read"] = matrices[-1].squeeze(-1).squeeze(1)
    return found
