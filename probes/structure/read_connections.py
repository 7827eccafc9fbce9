"""Which connections join the states of a memory? The calls that mix or add, and what the coefficients are computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from depthscope.probes.connections.coefficient_values import factors_of
from depthscope.probes.connections.constraint import LEAST_IN_TURN, times_in_turn
from depthscope.probes.reading.description import BranchReading, ConnectionReading, MemoryReading
from depthscope.probes.reading.graph import Graph, TracedValue
from depthscope.probes.reading.names import kind_of, shared_start
from depthscope.probes.reading.numbers import Numbers
from depthscope.probes.reading.operations import MOVES, SAME, addends, same_elements
from depthscope.probes.structure.chain import DEPTH, READ, Connection


class ConnectionReader:
    """The connections of one memory.

    ``layout_of``: as of the reader of its states.
    ``block_of``: the path of the block that a branch is in.
    ``producer``: the module that computed the state at a depth.
    """

    def __init__(
        self,
        graph: Graph,
        memory: MemoryReading,
        layout_of: Callable[..., str],
        block_of: Callable[[BranchReading], str],
        producer: Callable[[int], str],
    ):
        self.graph, self.memory, self.layout_of = graph, memory, layout_of
        self._block_of, self._producer = block_of, producer
        self.is_sinkhorn = True  # whether Sinkhorn's iteration made every matrix so far

    def weighted(self) -> tuple[Connection, ...]:
        """Those of a memory with streams, or over depth."""
        return tuple(self._connection(of) for of in self.memory.connections if of.branches)

    def plain(self, depths: Sequence[int]) -> tuple[Connection, ...]:
        """The branches of plain blocks between some states, where every one of them is the output of a module; else none."""
        found = [c for of in self.memory.connections for c in self._plain_connections(of, depths)]
        return () if None in found else tuple(c for c in found if c is not None)

    def _connection(self, of: ConnectionReading) -> Connection:
        """A connection of a memory with streams, or over depth."""
        branch = of.branches[-1]
        given = self._shown_branch(branch)
        call = None if given is None else self.graph.calls[given[0]]
        behind = self._behind_coefficients(of)
        self.is_sinkhorn &= times_in_turn(behind, self.memory.num_streams) >= LEAST_IN_TURN
        path = self._module_of(behind, branch) or branch.path or self._producer(of.depth_out)
        kind = branch.kind if branch.kind in ("attn", "mlp") else "block"
        parameters = (self.graph.parameter_names.get(value.number) for value in behind)
        return Connection(
            path=path,
            index=of.depth_in,
            layer=branch.layer,
            branch=kind,
            branch_path=None if call is None else call.path,
            branch_index=0 if call is None else call.number,
            style=DEPTH if self.memory.over_depth else READ,
            depth_in=of.depth_in,
            depth_out=of.depth_out,
            parameters=tuple(dict.fromkeys(filter(None, parameters))),
        )

    def _behind_coefficients(self, of: ConnectionReading) -> list[TracedValue]:
        """What the coefficients of a connection are computed from: all that scales and mixes the streams."""
        given = self.memory.carried.keys() | {number for branch in of.branches for number in branch.way}
        factors = (factor.number for factor in factors_of(self.graph, self.memory, of))
        return [self.graph.values[n] for n in sorted(self.graph.ancestors(factors, given) - given)]

    def _module_of(self, values: Sequence[TracedValue], branch: BranchReading) -> str:
        """The innermost module in which coefficients are computed; empty where that is the block, or around the branch."""
        computed = (value for value in values if value.func and value.name not in MOVES | SAME)
        stacks = [self.graph.stack(value) for value in computed]
        common = shared_start(stacks)
        path = self.graph.calls[common[-1]].path if common else ""
        around = path == self._block_of(branch) or f"{branch.path}.".startswith(f"{path}.")
        return "" if around else path

    def _plain_connections(self, of: ConnectionReading, depths: Sequence[int]) -> Iterator[Connection | None]:
        """The branches that are added between two plain states; None for one that no module gives."""
        for branch in of.branches:
            for given in self._shown_parts(branch):
                if given is None or not given[1]:
                    yield None
                    continue
                call, layout = given
                path, index = self.graph.calls[call].path, self.graph.calls[call].number
                own = branch.kind if branch.kind in ("attn", "mlp") else "block"
                yield Connection(
                    path=path,
                    index=index,
                    layer=branch.layer,
                    branch=own if path == branch.path else kind_of(path, self.graph.modules),
                    branch_path=path,
                    branch_index=index,
                    style="normed" if of.functions else "add",
                    depth_in=depths.index(of.depth_in),
                    depth_out=depths.index(of.depth_out),
                    layout=layout,
                )

    def _shown_parts(self, branch: BranchReading) -> list[tuple[int, str] | None]:
        """The calls that give what a branch adds; several where that is a sum of what these give, as in parallel blocks."""
        given, source = self._shown_branch(branch), self.graph.values[branch.way[0]]
        if given is not None or source.name != "add":
            return [given]
        return [self._shown_by(addend, branch.numbers[0]) for addend in addends(source)]

    def _shown_branch(self, branch: BranchReading) -> tuple[int, str] | None:
        """The outermost call that gives what a branch adds, that itself or what is moved or scaled of it; and its layout."""
        way = list(zip(branch.way, branch.numbers, strict=True))
        shown = (self._shown_by(self.graph.values[number], of) for number, of in reversed(way))
        return next((given for given in shown if given is not None), None)

    def _shown_by(self, value: TracedValue, numbers: Numbers) -> tuple[int, str] | None:
        whole = math.prod(self.memory.shape)  # what a branch gives for some of the tokens has other places
        for other in same_elements(self.graph, value) if value.numel >= whole else ():
            shown = self.graph.shown.get(other.number, ())
            calls = [each.call for each in shown if each.at == "output" and not each.item]
            if calls:
                own = numbers.reshape(other.shape) if other.numel == value.numel else None
                return min(calls), "" if own is None else self.layout_of(other, own)
        return None
