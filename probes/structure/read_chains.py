"""Which chains does a reading show? Its memories, and where a later forward shows their states: in a call or an operation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from depthscope.probes.reading.description import BranchReading, ConnectionReading, MemoryReading
from depthscope.probes.reading.graph import Graph, Shown, TracedValue
from depthscope.probes.reading.operations import SAME, VIEWS
from depthscope.probes.structure.chain import Chain, Connection, HookPoint

BLOCK = re.compile(r"(.*?\d+)(\.|$)")  # a module path up to its first number


@dataclass(frozen=True)
class ReadChain:
    """A chain, the memory that it was read from, and which state of the memory each of its depths is."""

    chain: Chain
    memory: MemoryReading
    states: tuple[int, ...]


def read_chain(graph: Graph, memory: MemoryReading, *, inside: bool) -> ReadChain:
    """The chain of one memory.

    ``inside``: whether the states inside of plain blocks are wanted, which are left out otherwise.
    """
    return _ChainOf(graph, memory).chain(inside=inside)


class _ChainOf:
    """The chain of one memory."""

    def __init__(self, graph: Graph, memory: MemoryReading):
        self.graph, self.memory = graph, memory
        self.connections = memory.connections
        self.branches = [branch for connection in self.connections for branch in connection.branches]

    def chain(self, *, inside: bool) -> ReadChain:
        """The chain, without the states inside of plain blocks where these are not wanted."""
        depths = list(range(len(self.memory.states)))
        joined = self._plain_connections(depths) if inside and self._is_plain else ()
        if self._is_plain and not joined:
            depths = [depth for depth in depths if not self._is_inside(depth)]
        points = [self._point(depth) for depth in depths]
        blocks = tuple(dict.fromkeys(self._block(branch) for branch in self.branches))
        kinds = dict.fromkeys(self.graph.modules[path] for path in blocks if path in self.graph.modules)
        chain = Chain(
            name="",
            points=tuple(point for point, _ in points),
            connections=joined,
            blocks=blocks,
            block_class="/".join(kinds),
            shapes=tuple(value.shape for _, value in points),
            proof=self.memory.proof,
        )
        return ReadChain(chain, self.memory, tuple(depths))

    @property
    def _is_plain(self) -> bool:
        return self.memory.num_streams == 1 and not self.memory.over_depth

    def _block(self, branch: BranchReading) -> str:
        """The path of the block that a branch is in."""
        if branch.unit >= 0:
            return self.graph.calls[branch.unit].path
        found = BLOCK.match(branch.path)
        return found[1] if found else branch.path

    # --- states

    def _is_inside(self, depth: int) -> bool:
        """Whether a state is made and read inside of one call of a block."""
        before, after = self._around(depth)
        if self.memory.states[depth].site != "mid" or not before or not after:
            return False
        return before[-1].unit == after[0].unit >= 0

    def _around(self, depth: int) -> tuple[list[BranchReading], list[BranchReading]]:
        """The branches that were added before a state, and those that come after it."""
        before = [b for c in self.connections if c.depth_out <= depth for b in c.branches]
        return before, [b for c in self.connections if c.depth_in >= depth for b in c.branches]

    def _point(self, depth: int) -> tuple[HookPoint, TracedValue]:
        """What shows a state in a later forward, and the value that it shows."""
        state = self.memory.states[depth]
        value = self.graph.values[state.values[-1]]
        places = [
            (other, shown) for other in self._same(value) for shown in self.graph.shown.get(other.number, ())
        ]
        producer = self._producer(depth, [shown for _, shown in places])
        best = max(places, key=lambda of: self._rank(depth, value, *of), default=None)
        if best is None:
            place = self.graph.place(value)
            point = HookPoint(
                place.module, place.call, "operation", state.layer, state.site, producer,
                item=place.order, operation=place.operation, result=place.result,
            )  # fmt: skip
            return point, value
        shown_value, shown = best
        call = self.graph.calls[shown.call]
        point = HookPoint(
            call.path, call.number, shown.at, state.layer, state.site, producer, item=shown.item
        )
        return point, shown_value

    def _rank(self, depth: int, value: TracedValue, other: TracedValue, shown: Shown) -> tuple[object, ...]:
        """The larger, the better a place shows a state: what its block takes, then what the block before gave.

        What a block takes is what is really handed on, in autograd too.
        """
        before, after = self._around(depth)
        takes = bool(after) and shown.at == "input" and shown.call == after[0].unit
        gives = bool(before) and shown.at == "output" and shown.call == before[-1].unit
        return takes, gives, other is value, shown.at == "output", -len(self.graph.calls[shown.call].path)

    def _same(self, value: TracedValue) -> list[TracedValue]:
        """A value, and others with the same elements: copies and views of it, and what it is one of."""
        found = [value]
        while len(found[-1].parents) == 1 and self._is_same(found[-1], found[-1].parents[0]):
            found.append(found[-1].parents[0])
        waiting = [value]
        while waiting:
            for taker in self.graph.takers(waiting.pop()):
                if len(taker.parents) == 1 and self._is_same(taker, taker.parents[0]):
                    found.append(taker)
                    waiting.append(taker)
        return found

    @staticmethod
    def _is_same(value: TracedValue, parent: TracedValue) -> bool:
        same = value.name in VIEWS or (value.name in SAME and value.name not in ("neg", "positive"))
        return (
            same
            and value.numel == parent.numel
            and value.dtype == parent.dtype
            and parent.kind != "parameter"
        )

    def _producer(self, depth: int, places: Sequence[Shown]) -> str:
        """The module that computed a state."""
        before, _ = self._around(depth)
        if before and self.memory.states[depth].site != "embed":
            block = self._block(before[-1])
            whole = before[-1].unit >= 0 and self.memory.states[depth].site != "mid"
            return block if whole else before[-1].path
        given = [shown.call for shown in places if shown.at == "output"]
        return self.graph.calls[given[-1]].path if given else "(input)"

    # --- connections

    def _plain_connections(self, depths: Sequence[int]) -> tuple[Connection, ...]:
        """The branches of plain blocks, where every one of them is the output of some module; else none."""
        found = [c for of in self.connections for c in self._connections_of(of, depths)]
        return () if None in found else tuple(c for c in found if c is not None)

    def _connections_of(self, of: ConnectionReading, depths: Sequence[int]) -> Iterator[Connection | None]:
        for branch in of.branches:
            call = self.shown_branch(branch)
            if call is None:
                yield None
                continue
            path, index = self.graph.calls[call].path, self.graph.calls[call].number
            yield Connection(
                path=path,
                index=index,
                layer=branch.layer,
                branch=branch.kind if branch.kind in ("attn", "mlp") else "block",
                branch_path=path,
                branch_index=index,
                style="normed" if of.functions else "add",
                depth_in=depths.index(of.depth_in),
                depth_out=depths.index(of.depth_out),
            )

    def shown_branch(self, branch: BranchReading) -> int | None:
        """The outermost call that gives what a branch adds: that itself, or what is moved or scaled of it."""
        for number in reversed(branch.way):
            for value in self._same(self.graph.values[number]):
                calls = [
                    shown.call
                    for shown in self.graph.shown.get(value.number, ())
                    if shown.at == "output" and not shown.item
                ]
                if calls:
                    return min(calls)
        return None
