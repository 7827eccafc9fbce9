"""Which chains does a reading show? Its memories, and where a later forward shows their states: in a call or an operation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from depthscope.probes.connections.computation import factors_of
from depthscope.probes.connections.proof import LEAST_IN_TURN, times_in_turn
from depthscope.probes.model.layout import LayoutError
from depthscope.probes.model.tensors import split_error
from depthscope.probes.reading.branches import Branch
from depthscope.probes.reading.description import ConnectionReading, MemoryReading
from depthscope.probes.reading.graph import Graph, Shown, TracedValue
from depthscope.probes.reading.memory import follow, start_of
from depthscope.probes.reading.names import kind_of, shared_start
from depthscope.probes.reading.numbers import Numbers
from depthscope.probes.reading.operations import (
    FUNCTIONS,
    MOVES,
    SAME,
    addends,
    before_all_readers,
    has_gradient,
    reordered,
    same_elements,
)
from depthscope.probes.structure.chain import ADD, DEPTH, READ, Chain, Connection, HookPoint, function_name

READ_BEFORE = (
    "a branch that is written into each had read a tensor of it before, so that autograd gives one sum of both "
    "gradients"
)
READ_INSIDE = (
    "a function of autograd makes each and reads it itself, so that autograd has a part of its gradient alone"
)


class ChainReader:
    """The chain of one memory; ``layout_of`` gives the layout of a value of it, or of one with given numbers, or nothing."""

    def __init__(self, graph: Graph, memory: MemoryReading, layout_of: Callable[..., str]):
        self.graph, self.memory, self.layout_of = graph, memory, layout_of
        self.connections = memory.connections
        self.branches = memory.branches
        # How many tensors hold the streams of a state
        self._num_tensors = max(len(state.values) for state in memory.states)
        self._of_layer: dict[int, list[Branch]] = {}
        for branch in self.branches:
            self._of_layer.setdefault(branch.layer, []).append(branch)
        self._called = {call.path for call in graph.calls}  # a block whose forward is called directly is not

    def chain(self, *, inside: bool, wanted: Sequence[int] | None) -> Chain:
        """The chain, with the states inside of plain blocks if ``inside`` is true, or with the ``wanted`` ones alone."""
        depths, joined = list(range(len(self.memory.states))), list[Connection | None]()
        if not self.memory.is_plain:
            joined += [self._connection(of) for of in self.connections if of.branches]
        elif inside:
            joined += [c for of in self.connections for c in self._plain_connections(of)]
        else:
            outside = [depth for depth in depths if not self._is_inside(depth)]
            depths = outside if wanted is None else list(wanted)
        points = [self._point(depth) for depth in depths]
        # The layout that most of them have, the first one of equally many.
        counts = Counter(self._layout(point) for point in points if point.streams or self._num_tensors == 1)
        del counts[""]
        layout = max(counts, key=lambda of: ("F" in of, counts[of]), default="")
        points = [
            point if self._layout(point) == layout else self._with_layout(depth, point, layout)
            for depth, point in zip(depths, points, strict=True)
        ]
        if self._num_tensors > 1:  # the streams of most states are tensors that are concatenated
            points = [
                replace(p, layout=p.layout and f"N {p.layout}" if p.streams else p.layout or layout)
                for p in points
            ]
            layout = f"N {layout}"
        self._require_one_order(points)
        if self.memory.is_plain:  # what no call hands on that made it lies inside of that
            points = [p if self._is_named_rightly(p) else replace(p, site="mid") for p in points]
        # The shapes of the states in the chain's layout: of one memory they are all the same.
        usual = next((point.shape for point in points if not point.layout), points[0].shape)
        blocks = tuple(dict.fromkeys(self._block(branch) for branch in self.branches))
        kinds = dict.fromkeys(self.graph.modules[path] for path in blocks if path in self.graph.modules)
        return Chain(
            name="",
            points=tuple(replace(point, shape=usual) if point.layout else point for point in points),
            # Those of plain blocks where every branch is the output of a module
            connections=() if None in joined else tuple(filter(None, joined)),
            blocks=blocks,
            block_class="/".join(kinds),
            layout=layout,
            history=self.memory.over_depth,
            proof=self.memory.proof,
            memories=(self._opened(self._value(points[0])),),
        )

    def _opened(self, shown: TracedValue) -> MemoryReading:
        """The memory, whose first step begins with a norm or activation where its first state is shown before one."""
        graph, memory = self.graph, self.memory
        first = graph.values[memory.states[0].values[-1]]
        if not memory.is_plain or shown in reordered(graph, [first]):
            return memory
        between = graph.values[shown.number + 1 : first.number + 1]
        passed = [of.name for of in between if of.name in FUNCTIONS and graph.depends(of, shown)]
        step, *later = memory.connections
        return replace(memory, connections=(replace(step, before_sum=passed or ["norm"]), *later))

    def _value(self, point: HookPoint) -> TracedValue:
        return self.graph.values[point.number]

    def _layout(self, point: HookPoint) -> str:
        return self.layout_of(self._value(point))

    def _is_named_rightly(self, point: HookPoint) -> bool:
        """Whether a call in which a state was made, and after which it is named, hands it on, if it hands anything on."""
        if point.site not in ("post", "pre"):
            return True
        value, shown = self._value(point), self.graph.shown
        given = [of for other in same_elements(self.graph, value) for of in shown.get(other.number, ())]
        paths = {self.graph.calls[of.call].path for of in given if of.at == "output"}
        if any(f"{point.module}.".startswith(f"{path}.") for path in paths if path):
            return True
        inside = [call for call in self.graph.stack(value) if self.graph.calls[call].path == point.module]
        return not inside or not any(
            of.call in inside and of.at == "output" for places in shown.values() for of in places
        )

    def _require_one_order(self, points: Sequence[HookPoint]) -> None:
        """Refuse states of which some have their tokens in another order: those of one shape and layout have one order."""
        orders: dict[tuple[object, ...], set[object]] = {}
        for point in points if self.memory.is_plain else ():
            numbers = self.memory.carried.get(point.number)
            if numbers is not None:
                orders.setdefault((point.shape, point.layout), set()).add(numbers.key)
        if any(len(keys) > 1 for keys in orders.values()):
            raise LayoutError(
                f"the tokens of {self.memory.name} are put into another order between two states; name the modules whose "
                "states are wanted with layers="
            )

    def _with_layout(self, depth: int, point: HookPoint, layout: str) -> HookPoint:
        """What shows a state in the layout of the others; where nothing does, what shows it in its own."""
        same = before_all_readers(self.graph, list(reordered(self.graph, [self._value(point)])))
        layouts, own = [of for other in same if (of := self.layout_of(other))], self._layout(point)
        # Streams and parts of their features that are one axis elsewhere may come in another order there.
        if ("F" in layout) == ("F" in (own or layout)) and layout in layouts:
            return self._point(depth, layout)
        if not own:
            own = next(iter(layouts), "")
            point = self._point(depth, own)
        return replace(point, layout=own)

    def _block(self, branch: Branch) -> str:
        """The path of the block that a branch is in: its call, or what the paths of its branches have in common."""
        own = self._of_layer[branch.layer]
        if branch.unit >= 0 and {other.unit for other in own} == {branch.unit}:
            return self.graph.calls[branch.unit].path
        parts = zip(*(other.path.split(".") for other in own), strict=False)
        common = [of[0] for of in parts if len(set(of)) == 1]  # of branches in several lists the number
        while common and not common[-1].isdigit():
            common.pop()
        return ".".join(common) or branch.path

    # --- connections: the calls that mix or add, and what the coefficients are computed from

    def _connection(self, of: ConnectionReading) -> Connection:
        """A connection of a memory with streams, or over depth."""
        branch = of.branches[-1].branch
        given = self._shown_branch(branch)
        call = None if given is None else self.graph.calls[given[0]]
        # What the coefficients are computed from: all that scales and mixes the streams.
        known = self.memory.carried.keys() | {number for each in of.branches for number in each.branch.way}
        factors = (factor.number for factor in factors_of(self.graph, self.memory, of))
        behind = [self.graph.values[n] for n in sorted(self.graph.ancestors(factors, known) - known)]
        path = self._module_of(behind, branch) or branch.path or self._producer(of.depth_out, ())
        parameters = (self.graph.parameter_names.get(value.number) for value in behind)
        return Connection(
            path=path,
            layer=branch.layer,
            branch=branch.kind,
            branch_path=None if call is None else call.path,
            branch_index=0 if call is None else call.number,
            style=DEPTH if self.memory.over_depth else READ,
            depth_in=of.depth_in,
            depth_out=of.depth_out,
            parameters=tuple(dict.fromkeys(filter(None, parameters))),
            is_sinkhorn=times_in_turn(behind, self.memory.num_streams) >= LEAST_IN_TURN,
        )

    def _module_of(self, values: Sequence[TracedValue], branch: Branch) -> str:
        """The innermost module in which coefficients are computed; empty where that is the block, or around the branch."""
        computed = (value for value in values if value.func and value.name not in MOVES | SAME)
        stacks = [self.graph.stack(value) for value in computed]
        common = shared_start(stacks)
        path = self.graph.calls[common[-1]].path if common else ""
        around = path == self._block(branch) or f"{branch.path}.".startswith(f"{path}.")
        return "" if around else path

    def _plain_connections(self, of: ConnectionReading) -> Iterator[Connection | None]:
        """The branches that are added between two plain states; None for one that no module gives."""
        for branch in (each.branch for each in of.branches):
            parts, source = [self._shown_branch(branch)], branch.source
            if parts == [None] and source.name == "add":  # of what several calls give, as in parallel blocks
                parts = [self._shown_by(addend, branch.numbers[source.number]) for addend in addends(source)]
            for given in parts:
                if given is None or not given[1]:
                    yield None
                    continue
                call, layout = given
                path, index = self.graph.calls[call].path, self.graph.calls[call].number
                yield Connection(
                    path=path,
                    layer=branch.layer,
                    branch=branch.kind if path == branch.path else kind_of(path, self.graph.modules),
                    branch_path=path,
                    branch_index=index,
                    style=function_name(of.after_sum) or ADD,
                    depth_in=of.depth_in,
                    depth_out=of.depth_out,
                    layout=layout,
                )

    def _shown_branch(self, branch: Branch) -> tuple[int, str] | None:
        """The outermost call that gives what a branch adds, that itself or what is moved or scaled of it; and its layout."""
        way = reversed(branch.way)
        shown = (self._shown_by(self.graph.values[number], branch.numbers[number]) for number in way)
        return next(filter(None, shown), None)

    def _shown_by(self, value: TracedValue, numbers: Numbers) -> tuple[int, str] | None:
        whole = math.prod(self.memory.shape)  # what a branch gives for some of the tokens has other places
        for other in same_elements(self.graph, value) if value.numel >= whole else ():
            shown = self.graph.shown.get(other.number, ())
            calls = [each.call for each in shown if each.at == "output" and not each.item]
            if calls:
                own = numbers.reshape(other.shape) if other.numel == value.numel else None
                return min(calls), "" if own is None else self.layout_of(other, own)
        return None

    # --- states

    def _is_inside(self, depth: int) -> bool:
        """Whether a state is made and read inside of one call of a block."""
        before, after = self._around(depth)
        if self.memory.states[depth].site != "mid" or before is None or after is None:
            return False
        return before.unit == after.unit >= 0

    def _around(self, depth: int) -> tuple[Branch | None, Branch | None]:
        """The last branch that was added before a state, and the first one that comes after it."""
        before = (of.branches[-1].branch for of in reversed(self.connections[:depth]) if of.branches)
        after = (of.branches[0].branch for of in self.connections[depth:] if of.branches)
        return next(before, None), next(after, None)

    def _point(self, depth: int, layout: str = "") -> HookPoint:
        """What shows a state later, in some layout if that is asked for; of several tensors each, and the last one."""
        numbers = self.memory.states[depth].values
        counts = {self.memory.carried[number].count for number in numbers}
        if len(numbers) == 1 and (self._num_tensors == 1 or counts != {math.prod(self.memory.shape)}):
            value = self.graph.values[numbers[0]] if depth else self._first()
            return self._point_of(depth, value, layout)
        found = [self._point_of(depth, self.graph.values[number], layout) for number in numbers]
        if len(set(map(self._layout, found))) > 1 or counts != {math.prod(self.memory.shape)}:
            raise LayoutError(
                f"the state of block {self.memory.states[depth].layer} consists of {len(found)} tensors of the shapes "
                f"{[point.shape for point in found]}; expected one tensor, or one for each stream with the same axes. "
                "Stack the streams into one, or name the modules whose states are wanted with layers="
            )
        streams, end = list[HookPoint](), max(numbers)
        for point in found:
            value = self._value(point)
            taken = {t.number for t in self.graph.takers(value) if t.number <= end and has_gradient(t)}
            # What was made of it before the state is there: what branches give, and other streams
            sources = [of.source for of in self.branches if value.number < of.source.number < end]
            sources += [self.graph.values[n] for n in numbers if n != value.number]
            behind = self.graph.earlier(sources if taken else (), {value.number})
            is_read = any(behind[number] for number in taken)
            streams.append(replace(point, without_gradient=READ_BEFORE) if is_read else point)
        streams *= self.memory.num_streams if len(found) == 1 else 1
        point = max(found, key=lambda of: of.number)
        return replace(point, streams=tuple(streams), shape=(len(streams), *point.shape))

    def _point_of(self, depth: int, value: TracedValue, layout: str) -> HookPoint:
        """What shows a value that is a state, or a stream of one."""
        state, same = self.memory.states[depth], same_elements(self.graph, value)
        moved = list(reordered(self.graph, [value]))
        if self._num_tensors > 1:  # what other streams are copies of has not the gradient of this one
            same = [other for other in same if other.number >= value.number]
        else:
            moved = before_all_readers(self.graph, moved)
            same = [other for other in same if other in moved] or moved[:1]
        if layout:
            same = [other for other in moved if self.layout_of(other) == layout]
            value = same[0] if same else value
        for other in same:
            if (split := self.graph.split.get(other.number)) is not None:
                raise split_error(split)
        places = [(other, shown) for other in same for shown in self.graph.shown.get(other.number, ())]
        best = max(places, key=lambda of: self._rank(depth, value, *of), default=None)
        until = None if best is None or best[1].at == "output" else best[1].order
        producer = self._producer(
            depth, [shown for _, shown in places if until is None or shown.order < until]
        )
        if best is None:
            # Without axes of size one, and with no others merged.
            value = min(same, key=lambda of: (of.shape.count(1), of is not value, len(of.shape)))
            place = self.graph.place(value)
            point = HookPoint(
                place.module, place.call, "operation", state.layer, state.site, producer, value.number, value.shape,
                item=place.order, operation=place.operation, result=place.result,
            )  # fmt: skip
        else:
            value, shown = best
            call = self.graph.calls[shown.call]
            if state.site == "pre" and shown.at == "input":  # changed before this block
                producer = call.path
            point = HookPoint(
                call.path, call.number, shown.at, state.layer, state.site, producer, value.number, value.shape,
                item=shown.item,
            )  # fmt: skip
        begin = self.graph.has_graph_from.get(value.number)
        early = (of for of in self.graph.takers(value) if begin is not None and of.number < begin)
        is_read = any(has_gradient(of) and self.graph.reaches_output(of) for of in early)
        return replace(point, without_gradient=READ_INSIDE) if is_read else point

    def _first(self) -> TracedValue:
        """The first state: what the first block takes of it, with its tokens in another order, or before a norm."""
        graph, value = self.graph, self.graph.values[self.memory.states[0].values[-1]]
        _, after = self._around(0)
        if after is None:
            return value
        reordered_of = {of.number for of in reordered(graph, [value])}
        same, unit = {of.number for of in same_elements(graph, value)}, after.unit
        for call in graph.stack(after.source)[1:]:  # what holds the block, and the block
            for given in graph.sides.get((call, "input"), ()):
                if given.shape != value.shape or given.number in same:
                    continue
                if given.number in reordered_of and self.layout_of(given) == self.layout_of(value):
                    return given
                is_before = self.memory.is_plain and call == unit and unit in graph.stack(value)
                if is_before and graph.depends(value, given):
                    passing = follow(graph, replace(start_of(given), functions=True), until=value.number)
                    return given if passing.holds(value) else value
        return value

    def _rank(self, depth: int, value: TracedValue, other: TracedValue, shown: Shown) -> tuple[object, ...]:
        """The larger, the better a place shows a state: what its block really takes, then what the block before gave."""
        before, after = self._around(depth)
        takes = after is not None and shown.at == "input" and shown.call == after.unit
        gives = before is not None and shown.at == "output" and shown.call == before.unit
        return takes, gives, other is value, shown.at == "output", -len(self.graph.calls[shown.call].path)

    def _producer(self, depth: int, places: Sequence[Shown]) -> str:
        """The module that computed a state."""
        before, _ = self._around(depth)
        given = [shown for shown in places if shown.at == "output" and shown.call]
        giver = self.graph.calls[max(given, key=lambda shown: shown.order).call].path if given else ""
        if before is None or self.memory.states[depth].site == "embed":
            return giver or "(input)"
        block, is_inside = self._block(before), self._is_inside(depth)
        if is_inside and giver and block in self._called and not giver.startswith(f"{block}."):
            return before.path  # later blocks hand it on, in a list of what came before
        if giver and self.memory.states[depth].layer > before.layer and not is_inside:
            return giver  # a block that only scales
        if before.unit >= 0 and not is_inside and block in self._called:
            return block
        return giver or before.path
