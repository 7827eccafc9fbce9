"""How is a forward read? Memories, branches, states, what joins them, the proof, and names: the one way."""

from __future__ import annotations

import math
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property
from itertools import pairwise, takewhile

import torch

from depthscope.diagnostics.errors import InputError, did_you_mean
from depthscope.probes.reading.branches import Branch, before_norms, branches_of, with_own_gates
from depthscope.probes.reading.choice import NO_MEMORY, memories
from depthscope.probes.reading.connections import DepthParts, Linear, weights
from depthscope.probes.reading.cuts import Cut, Cuts, cuts_of, last_read, size_of
from depthscope.probes.reading.description import (
    PROVEN,
    BranchReading,
    ConnectionReading,
    MemoryReading,
    StateReading,
)  # fmt: skip
from depthscope.probes.reading.graph import Graph, ReadingError, TracedValue
from depthscope.probes.reading.memory import Memory, follow
from depthscope.probes.reading.names import BranchNames, labels, name_of, number_blocks
from depthscope.probes.reading.operations import MIXES, only_moves
from depthscope.probes.reading.proof import (
    WeightCoverage,
    recomputed,
    recomputed_depth,
    tolerance,
    why_not_apart,
    why_not_ended,
    why_not_in_order,
)
from depthscope.probes.reading.states import States

PASSES = ("record", "memories", "branches", "cuts", "connections", "proof")
_printed: ContextVar[str | None] = ContextVar("printed", default=None)  # the pass whose result is printed


@contextmanager
def printed_after(name: str | None) -> Iterator[None]:
    """Print what one pass of each reading found that is made inside; nothing for None."""
    if name is not None and name not in PASSES:
        raise InputError(f"print_after is {name!r}; {did_you_mean(name, PASSES)}")
    token = _printed.set(name)
    try:
        yield
    finally:
        _printed.reset(token)


class Rereading:
    """The memories of a forward, the model's first; of later ones that run the same operations nothing is looked for again."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self._readers: list[_Reader] = []
        self.memories: list[MemoryReading] = []  # none where `refused` has the reason
        self.left_out: dict[str, str] = {}  # memories that were found and are not described, with the reasons
        self.refused = ""
        try:
            with torch.no_grad():
                self._read()
        except ReadingError as error:
            self.refused = str(error)
        if (name := _printed.get()) is not None:
            refused = [f"refused: {self.refused}"] if self.refused else []
            sys.stdout.writelines(f"{line}\n" for line in (*self._found_by(name), *refused))

    def _found_by(self, name: str) -> Iterable[str]:
        """What a pass found, a line each."""
        values, readers, found = self.graph.values, self._readers, self.memories
        return {
            "record": (f"{value!r} {self.graph.path(value)}" for value in values),
            "memories": (
                f"{of.memory.root!r} → {of.memory.end!r}: {len(of.memory.carried)} values, {of.memory.num_writes} writes"
                for of in readers
            ),
            "branches": (
                f"{branch.layer} {branch.kind} {branch.path}: reads {branch.read!r}, gives {branch.source!r}, "
                f"added in {branch.writes}"
                for of in readers for branch in of.branches
            ),
            "cuts": (
                f"{state.layer} {state.site}: {[values[number] for number in state.values]}"
                for memory in found for state in memory.states
            ),
            "connections": (
                f"{joint.depth_in} → {joint.depth_out}: {[of.branch.path for of in joint.branches]}, off by {joint.error:.1e}"
                for memory in found for joint in memory.connections
            ),
            "proof": (
                f"{memory.name}: {memory.proof}, off by {memory.error:.1e}, {memory.share:.0%} of the weights"
                for memory in found
            ),
        }[name]  # fmt: skip

    def _read(self) -> None:
        if (error := self.graph.error) is not None:
            why = str(error) if isinstance(error, ReadingError) else repr(error)
            raise ReadingError(f"the forward could not be recorded: {why}")
        found = memories(self.graph)
        _refuse_recurrence(self.graph, found[0])
        self._readers = _numbered(found)
        outer = [reader.outer() for reader in self._readers]
        if any(new is not old for new, old in zip(outer, found, strict=True)):
            self._readers = _numbered(outer)
        for number, reader in enumerate(self._readers):
            try:
                self.memories.append(reader.reading())
            except ReadingError as error:
                if not number:
                    raise
                self.left_out[reader.name] = str(error)

    def keep(self, memory: MemoryReading) -> None:
        """Read this memory alone from now on, and let go of the first forward's tensors."""
        self._readers = [next(of for of in self._readers if of.memory.root.number == memory.root)]
        self.memories = []
        self.graph.let_go()

    @torch.no_grad()
    def again(self, graph: Graph) -> MemoryReading:
        """The memory that was kept, in a later forward with its tensors held; ReadingError where it is not found."""
        if graph.error is not None:
            raise ReadingError(f"a later forward could not be recorded: {graph.error}")
        if graph is not self.graph and not self.graph.takes_over(graph):
            other, wanted = Rereading(graph), self._readers[0].place
            found = next((of for of in other._readers if of.place == wanted), None)
            if found is None:
                why = f": {other.refused}" if other.refused else ""
                raise ReadingError(
                    f"{self._readers[0].name} was not found again in a later forward, whose operations are others{why}"
                )
            self.graph, self._readers = graph, [found]
        return self._readers[0].again()


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


def _numbered(found: Sequence[Memory]) -> list[_Reader]:
    readers = [_Reader(memory, found) for memory in found]
    number_blocks([reader.names for reader in readers])
    return readers


class _Reader:
    """The reading of one memory."""

    def __init__(self, memory: Memory, others: Sequence[Memory]):
        self.others = [other for other in others if other is not memory]
        self.memory, self.graph = memory, memory.graph
        self.branches = branches_of(memory)
        if not self.branches:
            raise ReadingError(NO_MEMORY)
        self._before: MemoryReading | None = None  # of an earlier forward, but for its coefficients
        self._cuts: Cuts | None = None  # the states, where their connections are read
        self._inner: _Reader | None = None  # of another memory that is read in the place of this one
        self.names = BranchNames(memory, self.branches)
        self.name, self.place = name_of(self.names), self.graph.place(memory.root)

    @property
    def layers(self) -> list[int]:
        """The block numbers of its branches."""
        return [branch.layer for branch in self.branches]

    @cached_property
    def _first_cuts(self) -> Cuts:
        return cuts_of(self.memory, self.branches, self.layers)

    def outer(self) -> Memory:
        """The memory without sums inside of blocks that add all of what they make to one state, as an interpolation does."""
        memory, cuts = self.memory, self._first_cuts.cuts
        states = [cut for cut in cuts[:-1] if size_of(memory, cut) == memory.count] + [[memory.end]]
        if not len(set(self.layers)) < len(states) < len(cuts):
            return memory
        inner: set[int] = set()
        for (before, *_), (after, *_) in pairwise(states):
            *_, joined = memory.line(after)
            depth = memory.depth
            made = [of for of in memory.inside(joined) if depth[of.number] > depth[before.number]]
            inner |= {number for number in memory.back(made) if depth[number] > depth[before.number]}
        outer = follow(self.graph, replace(memory.start, banned=memory.start.banned | inner))
        if not branches_of(outer):
            return memory
        found = _numbered([outer])[0]._first_cuts
        same = found.cuts[:-1] == states[:-1] and len(found.cuts) == len(states)
        return outer if same and not found.over_depth else memory

    def again(self) -> MemoryReading:
        """The same, of a later forward that ran the same operations: what was proven of the first one is not proven again."""
        if self._inner is not None:
            return self._inner.again()
        if self._before is None or self._cuts is None:
            return self.reading()
        self.states.forget()
        return self._read_between(self._cuts)

    def reading(self) -> MemoryReading:
        """The memory's description; ReadingError where none can be given."""
        if (of_all_tokens := self._of_all_tokens()) is not None:
            return self._instead(of_all_tokens)
        found = self._first_cuts
        changed = [] if found.over_depth else [steps for steps, _ in self.names.steps_alone.values()]
        if changed:
            found = cuts_of(self.memory, self.branches, self.layers, changed)
        self.states = States(self.memory, self.branches)
        # Of streams, gates of each feature are parts of the branches: their weights are then one number for each stream.
        has_streams = found.over_depth or self.states.num_streams(found.cuts[-1]) > 1
        if has_streams and with_own_gates(self.memory, self.branches, self.states.feature_stride):
            self.states = States(self.memory, self.branches)
        if found.over_depth and (plain := self._before_last_mixture()) is not None:
            read = self._instead(plain)
            path = self.graph.path(self.memory.end) or "the model"
            return replace(read, mixed_for_head=path) if read.is_proven else read
        sizes = [size_of(self.memory, cut) for cut in found.cuts]
        narrow = [cut for cut, size in zip(found.cuts, sizes, strict=True) if size == min(sizes)]
        if found.over_depth and len(narrow) > 2 and (inner := self._inner_streams(narrow)) > 1:
            why = f"unproven: {inner} streams are expanded and merged inside each step, and one is handed on"
            return replace(self._described(narrow, [], [0.0], over_depth=False), proof=why)
        return self._read_between(found)

    def _instead(self, other: _Reader) -> MemoryReading:
        """The reading of another memory in the place of this one."""
        number_blocks([other.names])
        self._inner = other
        return other.reading()

    def _of_all_tokens(self) -> _Reader | None:
        """The reader of the memory before the blocks at its end that go on with some of the tokens alone."""
        memory = self.memory
        trunk = [self.graph.values[number] for number in sorted(memory.trunk)]
        whole = [value for value in trunk if memory.is_whole(value)]
        after = [value for value in trunk if value.number > whole[-1].number]
        if memory.writes.keys().isdisjoint(value.number for value in after):
            return None
        gone = self.graph.later(after[0])
        cut = replace(
            memory,
            carried={number: of for number, of in memory.carried.items() if not gone[number]},
            writes={number: of for number, of in memory.writes.items() if not gone[number]},
            leaves=[(read, taker) for read, taker in memory.leaves if not gone[read.number]],
        )
        return self._until(whole[-1], cut)

    def _until(self, value: TracedValue, memory: Memory) -> _Reader | None:
        """The reader of a memory up to one of its values; None where no branch comes before that."""
        shorter = replace(memory, end=value, trunk=memory.back([value]), branches=None)
        return _Reader(shorter, self.others) if branches_of(shorter) else None

    def _before_last_mixture(self) -> _Reader | None:
        """The reader of the memory up to its last write, where only the head reads a mixture of the states before."""
        memory = self.memory
        value = self.graph.values[max(memory.writes.keys() & memory.trunk)]
        for after in memory.after(value):
            if len(memory.inside(after)) > 1:
                break
            value = after
        if value is memory.end:
            return None
        reader = self._until(value, memory)
        if reader is None or len(reader.branches) < len(self.branches):
            return None
        number_blocks([reader.names])
        shorter = reader.memory
        found = cuts_of(shorter, reader.branches, reader.layers)
        states = {value.number for cut in found.cuts for value in cut}
        is_plain = not found.over_depth and all(
            any(of.number in states for of in shorter.line(branch.read)) for branch in reader.branches
        )
        return reader if is_plain else None

    def _read_between(self, found: Cuts) -> MemoryReading:
        """What joins the states, at the present values of the forward's tensors."""
        self._cuts, self.linear = found, Linear(self.states)
        if found.over_depth:
            return self._over_depth(found.cuts)
        connections: list[ConnectionReading] = []
        for number, after in enumerate(found.cuts[1:]):
            before = found.cuts[number]
            of = self.linear.joined_by(number, before, after, self.branches)
            if self._before is None:
                ordered = self._in_places(before, after, of.h_res)
                if ordered != after:
                    found.cuts[number + 1] = ordered
                    of = self.linear.joined_by(number, before, ordered, self.branches)
                of.error = recomputed(self.states, before, of)
            connections.append(of)
        if any(not branch.reads for of in connections for branch in of.branches):
            return self._over_depth(found.cuts)  # a branch reads an earlier state than the last one
        return self._described(found.cuts, connections, [of.error for of in connections], over_depth=False)

    def _in_places(self, before: Cut, after: Cut, h_res: torch.Tensor) -> Cut:
        """The values of a state that hold a stream each, which keeps its place; others in the order of what mixes them."""
        if len(after) == 1 or h_res.shape[1:3] != (len(after), len(after)):
            return after
        order: dict[int, TracedValue] = {}
        for value, weights_of in zip(after, h_res.any(-1).any(0), strict=True):
            line = takewhile(lambda of: of.name not in MIXES, self.memory.line(value))
            if any(of in before for of in line) and int(weights_of.sum()) == 1:
                order.setdefault(int(weights_of.nonzero()), value)
        birth = {
            value: [*takewhile(lambda of: of not in before, self.memory.line(value))][-1:] for value in after
        }
        others = [value for value in after if value not in order.values()]
        rest = iter(sorted(others, key=lambda value: [of.number for of in birth[value]]))
        return [order.get(place) or next(rest) for place in range(len(after))]

    def _described(
        self,
        cuts: Sequence[Cut],
        connections: Sequence[ConnectionReading],
        errors: list[float],
        *,
        over_depth: bool,
    ) -> MemoryReading:
        if self._before is not None:
            return replace(self._before, connections=tuple(connections))
        coverage = WeightCoverage(self.memory, self.branches, cuts[-1], self.others)
        worst = max(errors, default=math.inf)
        end = max(value.number for value in cuts[-1])
        carried = [value for n in self.memory.trunk if (value := self.graph.values[n]).number <= end]
        scaled = (self.graph.values[n] for branch in self.branches for n in branch.steps)
        carried += [value for value in scaled if not only_moves(value)]
        allowed = tolerance(carried)
        why = why_not_in_order(self.graph, cuts) or coverage.why_incomplete()
        if over_depth:
            why = why or self._other_end(cuts)
        else:
            why = why or why_not_apart(self.memory, cuts, coverage.of_others)
            why = why or why_not_ended(self.memory, self.branches)
        if not worst <= allowed:
            number = next(n for n, error in enumerate(errors) if not error <= allowed)
            why = f"state {number + 1} is off by {errors[number]:.2g} of its largest number when it is made of its parts"
        found = MemoryReading(
            name=self.name,
            states=tuple(self._states(cuts)),
            connections=tuple(connections),
            num_streams=self.states.num_streams(cuts[-1]),
            over_depth=over_depth,
            inner_streams=self._inner_streams(cuts),
            token_shape=self.states.token_shape,
            root=self.memory.root.number,
            shape=self.memory.shape,
            feature_axis=self.states.axis,
            carried=self.memory.carried,
            held=coverage.held,
            parameters=coverage.parameters,
            proof=f"unproven: {why}" if why else PROVEN,
            error=worst,
            share=coverage.share(),
            casts=tuple(dict.fromkeys(v.dtype for v in carried if v.dtype != self.memory.root.dtype)),
        )
        self._before = replace(found, connections=())
        return found

    def _other_end(self, cuts: Sequence[Cut]) -> str:
        """Why the last state over depth is not all that the head reads, as of a second stream; empty where it is."""
        memory, depth = self.memory, max(value.number for cut in cuts[:-1] for value in cut)
        known = {value.number for cut in cuts for value in cut}.union(
            read.number for branch in self.branches for read in (branch.read, *branch.reads)
        )
        for read, taker in memory.leaves:
            is_one = memory.is_whole(read) and memory.carried[read.number].count == memory.count
            is_late = read.number > depth and is_one and self.graph.reaches_output(taker)
            if is_late and not any(of.number in known for of in memory.line(read)):
                return f"{self.graph.path(taker) or 'the head'} takes another sum of what came before than the last state"
        return ""

    def _inner_streams(self, cuts: Sequence[Cut]) -> int:
        """How many copies of one state every step makes and merges again."""
        memory, counts, trunk = self.memory, set(), sorted(self.memory.trunk)
        for before, after in pairwise(cuts):
            between = trunk[bisect_right(trunk, before[-1].number) : bisect_left(trunk, after[-1].number)]
            counts.add(max((memory.carried[n].count for n in between), default=0) // memory.count)
        single = all(size_of(memory, cut) == memory.count for cut in cuts)
        return counts.pop() if len(counts) == 1 and single and max(counts) > 1 else 0

    def _states(self, cuts: Sequence[Cut]) -> list[StateReading]:
        return [
            StateReading(*label, tuple(value.number for value in cut))
            for cut, label in zip(cuts, labels(self.names, cuts), strict=True)
        ]

    def _over_depth(self, cuts: Sequence[Cut]) -> MemoryReading:
        last = before_norms(self.memory, last_read(self.memory, self.branches))
        # One state at a time, of which branches read earlier ones.
        single = all(len(cut) == 1 for cut in cuts)
        values = [cut[0] for cut in cuts] if single else self._bases(last)
        by_read = not values
        values = values or [*map(self._read_state, self.branches), last]
        values[0] = self._first_state(values)
        values = self._with_given(values)
        # What is added to the first value, as positions are, is no norm of the branch.
        for branch in self.branches:
            earlier = {
                read: values[0] for read in branch.reads_before_norms if read.number < values[0].number
            }
            branch.reads_before_norms = [earlier.get(read, read) for read in branch.reads_before_norms]
            branch.read = earlier.get(branch.read, branch.read)
        parts = self.linear.over_depth(self.branches, values)
        _begin_with_first_state(parts)
        first = self._read_state(self.branches[0]) if by_read else parts.states[0]
        if parts.weights.get(first.number, parts.sources[0][:, :1]).shape[-1] > 1:
            parts.states = list(dict.fromkeys([parts.states[0], first, *parts.states[1:]]))
        error = recomputed_depth(self.states, parts) if self._before is None else 0.0
        pairs = list(pairwise(parts.states))
        connections = [
            self._depth_connection(
                number, (pair[0] if number or first in parts.states else first, *pair), parts, error, by_read
            )
            for number, pair in enumerate(pairs)
        ]
        cuts = [[value] for value in parts.states]
        return self._described(cuts, connections, [error] * max(len(pairs), 1), over_depth=True)

    def _with_given(self, values: Sequence[TracedValue]) -> list[TracedValue]:
        """The same, with what a block makes of its state, where the next state is a mixture of that and of earlier ones."""
        memory, found = self.memory, [values[0]]
        pairs = [(branch.read, write) for branch in self.branches for write in branch.writes]
        for before, after in pairwise(values):
            sums = [(read, of) for read, of in pairs if before.number < of.number < after.number]
            made = [of for read, of in sums if not {before, read}.isdisjoint(memory.line(of))]
            if made and memory.mixed_between(made[-1], after):
                found.append(made[-1])
            found.append(after)
        return found

    def _first_state(self, values: Sequence[TracedValue]) -> TracedValue:
        """The last value through which all that is read and all later states come."""
        memory, root = self.memory, self.memory.root
        ends = [*values[1:], *(read for branch in self.branches for read in branch.reads)]
        for number in sorted(memory.back(ends), reverse=True):
            value = self.graph.values[number]
            if value.numel == memory.count and (
                value is root or root.number not in memory.back(ends, {number})
            ):
                return value
        return values[0]

    def _depth_connection(
        self,
        number: int,
        pair: tuple[TracedValue, TracedValue, TracedValue],
        parts: DepthParts,
        error: float,
        by_read: bool,
    ) -> ConnectionReading:
        read_state, before, after = pair
        new = [
            k for k, branch in enumerate(self.branches)
            if (self._read_state(branch) is read_state if by_read else before.number < branch.writes[0].number <= after.number)
        ]  # fmt: skip
        carry, found = parts.of(after).clone(), []
        carry[:, [k + 1 for k in new]] = 0
        for branch, k in ((self.branches[k], k + 1) for k in new):
            write = weights(parts.of(after)[:, k])[:, None, None]
            read = torch.cat([parts.weights[of.number] for of in self.linear.mixtures(branch)], 1)
            found.append(BranchReading(branch, write, parts.sources[k].unsqueeze(1), read))
        constant, state = parts.constants.get(after.number), parts.of(before)
        return ConnectionReading(
            number, carry.unsqueeze(1), found, constant, [before], [after], error=error, state=state
        )

    def _read_state(self, branch: Branch) -> TracedValue:
        """What a branch reads; where it reads several mixtures at once, what its output is added to."""
        inside = self.memory.inside(branch.writes[0])
        if (
            sum(self.states.num_streams([read]) for read in self.linear.mixtures(branch)) > 1
            and len(inside) == 1
        ):
            return inside[0]
        # Of what it reads at once, the last that is one value, and not several next to one another.
        reads = [branch.read, *reversed(branch.reads_before_norms)]
        return next((read for read in reads if self.states.num_streams([read]) == 1), branch.read)

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


def _begin_with_first_state(parts: DepthParts) -> None:
    """Take the first state for the first source: the scale of what it was made of is no weight then.

    What is added to that, as positions are, is a part of it where every sum has both by one weight.
    """
    first = parts.states[0]
    scale, added = parts.of(first)[:, 0].clone(), parts.constants.get(first.number)
    if bool((scale == 0).any()) or bool((parts.of(first)[:, 1:] != 0).any()):
        return
    ratios = {number: of[:, :, 0] / scale[:, None] for number, of in parts.weights.items()}
    parts.sources[0] = parts.sources[0] * scale
    if added is not None and len(parts.constants) == sum(bool((of != 0).any()) for of in ratios.values()):
        largest = float(added.abs().max())
        pairs = [(ratios[number], constant) for number, constant in parts.constants.items()]
        apart = [((of - r * added).abs(), 1e-5 * largest * r.abs().clamp_min(1)) for r, of in pairs]
        if all(bool((error <= allowed).all()) for error, allowed in apart):
            parts.sources[0] = parts.sources[0] + added[:, 0]
            parts.constants.clear()
    for number, of in parts.weights.items():
        own = ratios[number].unsqueeze(2)
        scaled = torch.cat([own, of[:, :, 1:].expand(*of.shape[:2], -1, own.shape[-1])], 2)
        parts.weights[number] = weights(scaled)  # the gain of a norm of the embedding was one of each feature
