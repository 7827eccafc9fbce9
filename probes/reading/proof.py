"""Is what was read true, and is it everything? States and reads from the reported parts alone; where every weight works."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise

import torch

from depthscope.probes.reading.branches import Branch, branches_of
from depthscope.probes.reading.connections import DepthParts
from depthscope.probes.reading.cuts import Cut
from depthscope.probes.reading.description import ConnectionReading, MemoryReading
from depthscope.probes.reading.graph import Graph, TracedValue, names, walk
from depthscope.probes.reading.memory import Memory
from depthscope.probes.reading.operations import (
    JOINS,
    LAYERS,
    MATRICES,
    MOST_STREAMS,
    MOVES,
    PRODUCTS,
    REDUCES,
    SAME,
    SCATTERS,
    SUMS,
    TURNS,
    addends,
    is_unknown,
    named,
    only_moves,
    weights,
    weights_in,
)  # fmt: skip
from depthscope.probes.reading.states import States

# Heuristic: a single residual outside of the states is named from this share of the parameters on, inside of a branch from
# the other; several that follow one another always.
OUTSIDE_SHARE, INSIDE_SHARE = 0.1, 0.5
PLAIN = names("add sub stack")
ADDED = (PLAIN | {*SUMS, *SCATTERS}) - names("copy masked_fill")
LINEAR = SAME | MOVES | TURNS | PRODUCTS.keys()  # what carries what it takes, each alone or weighed by a gate
# Of sums in another order, in units of the least difference that the model's numbers have.
ROUNDING = {torch.float64: 512.0, torch.float32: 512.0, torch.bfloat16: 4.0, torch.float16: 16.0}


def tolerance(values: Iterable[TracedValue]) -> float:
    """How far recomputed values may be off, relative to their largest number."""
    return max(ROUNDING.get(v.dtype, 4.0) * torch.finfo(v.dtype).eps for v in values if v.is_floating)


def _error(again: torch.Tensor, true: torch.Tensor) -> float:
    """How far a value is from what it is made of; what is not finite must come out so again."""
    if not true.numel():
        return 0.0
    error, largest = (float(torch.linalg.vector_norm(of, math.inf)) for of in (again - true, true))
    if math.isfinite(error) and math.isfinite(largest):
        return error / max(largest, 1e-9)
    known = true.isfinite()
    if bool(known.all()) or bool((again.isfinite() & ~known).any()):
        return math.inf
    return _error(again[known], true[known])


def _applied(matrix: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """(tokens, to, from, features or 1) applied to (tokens, from, features)."""
    matrix = matrix.to(state)
    if state.shape[-2] == 1:
        return matrix[..., 0, :] * state
    if matrix.shape[-1] == 1:
        return matrix[..., 0] @ state
    return (matrix * state.unsqueeze(-3)).sum(-2)


def recomputed(states: States, before: Cut, of: ConnectionReading) -> float:
    """How far the next state, and every read, are from what the reported parts give."""
    first, state, worst = min(value.number for value in of.start), states.array(of.start), 0.0
    for branch in of.branches:
        for read, weight in branch.reads:
            base = of.start if read.number >= first else before
            if [read] != base and _is_pure(states, base, read):
                worst = max(worst, _error(_applied(weight, states.array(base)), states.array([read])))
    total = _applied(of.h_res, state)
    for branch in of.branches:
        total = total + _applied(branch.write, branch.out)
    total = total if of.constant is None else total + of.constant
    return max(worst, _error(total, states.array(of.target)))


def _is_pure(states: States, before: Cut, read: TracedValue) -> bool:
    """Whether a read is made of a state alone: no other branch and no constant comes to it in between."""
    memory, cut = states.memory, {value.number for value in before}
    starts = [read] if read.number not in cut else []
    steps = walk(starts, lambda value: (p for p in memory.inside(value) if p.number not in cut))
    return all(
        memory.inside(step) and step.number not in memory.writes and not memory.adds_constant(step)
        for step in steps
    )


def recomputed_depth(states: States, parts: DepthParts) -> float:
    """How far states and reads are from the weighted sums of what is reported."""
    sources = torch.stack(parts.sources, 1)
    worst = 0.0
    for number, weight in parts.weights.items():
        total = _applied(weight, sources) + parts.constants.get(number, 0)
        true = states.array([states.graph.values[number]])
        worst = max(worst, *(_error(total[:, row], true[:, row]) for row in range(weight.shape[1])))
    return worst


def why_not_in_order(graph: Graph, cuts: Sequence[Cut]) -> str:
    """Why some states are no depths; empty where each is computed from the one before."""
    for number, (before, after) in enumerate(pairwise(cuts), 1):
        if not all(value in before or any(graph.depends(value, of) for of in before) for value in after):
            where = graph.path(after[-1]) or "the model"
            return (
                f"state {number}, made in {where}, is not computed from state {number - 1}: they lie in lanes side by side, "
                "which are not one stream"
            )
    return ""


def why_not_apart(memory: Memory, cuts: Sequence[Cut], known: AbstractSet[int]) -> str:
    """What is computed on beside the states, each of which parts what comes before from what comes after; empty for nothing.

    By value: the last state that it was computed from, and how often its way passed a state since without touching it.
    ``known``: what other memories carry, beside which nothing has to be said.
    """
    graph, later = memory.graph, memory.graph.later(memory.root)
    of_states: dict[int, set[int]] = {}
    for at, cut in enumerate(cuts):
        for value in cut:
            of_states.setdefault(value.number, set()).add(at)
    made = [max(value.number for value in cut) for cut in cuts]
    level, beside = {memory.root.number: -1}, {memory.root.number: 0}
    for value in graph.values[memory.root.number + 1 : made[-1] + 1]:
        number = value.number
        taken = [parent.number for parent in value.parents if parent.number in level] if later[number] else []
        if not taken or not graph.reaches_output(value):
            continue
        own = of_states.get(number, set())
        states = (at for before in taken for at in of_states.get(before, ()) if number > made[at])
        level[number] = max(*(level[before] for before in taken), *states, -1)
        if own and made[min(own)] == number:
            level[number] = max(level[number], min(own))
        beside[number] = 0
        for before in taken:
            far = 0 if before in of_states or before in known else beside[before]
            passed = set(range(level[before] + 1, level[number] + 1)) - of_states.get(before, set()) - own
            if passed and far and graph.values[before].numel >= memory.count:
                where = graph.path(graph.values[before]) or "the model"
                return f"what {where} makes is computed on beside the states: it passes state {max(passed)}, and is none"
            beside[number] = max(beside[number], far + bool(passed))
    return ""


def why_not_ended(memory: Memory, branches: Sequence[Branch]) -> str:
    """A branch that is said to end before it does: what scales its output alone is computed from that, as a norm is."""
    graph = memory.graph
    for branch in branches:
        way = [graph.values[number] for number in branch.way]
        for before, after in pairwise(way):
            by = [of for of in after.parents if of is not before] if after.numel == way[0].numel else []
            if after.name in PRODUCTS and any(graph.depends(of, way[0]) for of in by):
                return f"what {graph.path(way[0]) or 'a branch'} gives is scaled by what is computed from it"
    return ""


class WeightCoverage:
    """Where the parameters work that reach the output: before the first state, in a branch, in the head, or elsewhere."""

    def __init__(
        self,
        memory: Memory,
        branches: Sequence[Branch],
        last: Sequence[TracedValue],
        others: Sequence[Memory],
    ):
        self._all = [memory, *others]
        self.memory, self.graph, self.branches, self.last = memory, memory.graph, branches, last
        graph, outputs = self.graph, self.graph.outputs or [memory.end]
        self.of_others = set[int]()
        # With what lies inside of their branches: a residual of their own is none of the model's.
        for other in others:
            behind = graph.earlier([branch.source for branch in branches_of(other)], other.carried)
            self.of_others |= {n for n, later in enumerate(graph.later(other.root)) if later and behind[n]}
            self.of_others |= other.carried.keys()
        self._used = weights_in(graph, graph.earlier(outputs))
        self._before = graph.earlier([graph.values[number] for number in memory.begins])
        self._head = graph.earlier(outputs, memory.carried)
        carried = memory.back([memory.end, *(branch.read for branch in branches)])
        end = max(value.number for value in last)
        after = graph.earlier(outputs, {number for number in memory.carried if number <= end})
        self._in_branches = self._between(carried) & self._used
        outside = weights_in(graph, self._before) | weights_in(graph, after)
        self._elsewhere = self._used - self._in_branches - outside
        self.held = frozenset(number for number in carried if number <= end)
        # Of the parameters in branches that work on what the first state gave, and in no other tower
        later = graph.later(memory.root)
        self.parameters = _names(
            graph, (w for n, of in weights(graph).items() if later[n] for w in of if w in self._in_branches)
        )

    def _between(self, carried: set[int]) -> set[TracedValue]:
        """The weights of branches, and of the coefficients with which the memory is mixed, read and written."""
        memory, values = self.memory, self.graph.values
        steps = (values[number] for number in carried - memory.begins)
        ends = [p for of in steps for p in set(of.parents).difference(memory.inside(of))]
        ends += [values[number] for number in memory.born & carried]
        ends += [branch.source for branch in self.branches]
        marks = self.graph.earlier(ends, carried - memory.born)
        for number in carried:
            marks[number] = 1
        for number, is_before in enumerate(self._before):
            if is_before:
                marks[number] = 0
        return weights_in(self.graph, marks)

    def share(self, of: AbstractSet[TracedValue] | None = None) -> float:
        """The share of the branches, or of some weights, of those that reach the output."""
        own = self._in_branches if of is None else of
        return sum(w.numel for w in own) / max(sum(w.numel for w in self._used), 1)

    def why_incomplete(self) -> str:
        """What the states leave out; empty where they are complete."""
        if self._elsewhere:
            names = sorted(self.graph.parameter_names.get(w.number, "") for w in self._elsewhere)
            return f"{self.share(self._elsewhere):.0%} of the weights lie in no branch (first: {names[0]})"
        return (
            self._residual_outside()
            or self._hidden_branches()
            or self._parts_put_next()
            or self._unread_writes()
            or self._unknown_sum()
        )

    def _residual_outside(self) -> str:
        """A sum of a value and of what was computed from it, that may be a state before the first one or after the last."""
        graph, root, end = self.graph, self.memory.root.number, max(value.number for value in self.last)
        outside = (
            value.number
            for value in graph.values
            if value.name in PLAIN and value.number not in self.of_others
            if (self._before if value.number <= root else self._head)[value.number]
            if not root < value.number <= end
        )
        for value, branch in residuals(graph, outside, self.memory.carried.keys()):
            is_first = value.number <= root
            if not is_first and not graph.depends(graph.values[min(branch)], self.last[-1]):
                continue
            if value.numel == self.memory.count or self._is_next_to_blocks(branch):
                where = "before the first" if is_first else "after the last"
                return f"{graph.path(value) or 'the model'} adds a branch {where} state that was found"
        return ""

    def _is_next_to_blocks(self, numbers: Iterable[int]) -> bool:
        """Whether some values were made in a module that is held by what holds a block of the memory, by numbers."""

        def containers(values: Iterable[TracedValue]) -> set[str]:
            stacks = (map(self.graph.calls.__getitem__, self.graph.stack(value)) for value in values)
            around = ([call.container for call in stack if call.container is not None] for stack in stacks)
            return {found[-1] for found in around if found}

        made = (self.graph.values[number] for number in numbers)
        return not containers(made).isdisjoint(containers(branch.source for branch in self.branches))

    def _unknown_sum(self) -> str:
        """What takes a state and gives one as large may hide a sum, where weights lie before it or a memory comes after."""
        graph = self.graph
        unknown = [v for v in graph.values if v.numel == self.memory.count and is_unknown(v)]
        if not unknown:
            return ""
        carried = set().union(*(memory.carried for memory in self._all))
        sources = [branch.source for memory in self._all for branch in branches_of(memory)]
        inside = graph.earlier(sources, carried)
        for value in unknown:
            behind = graph.earlier(value.parents, carried)
            between = [value, *(graph.values[n] for n, marked in enumerate(behind) if marked)]
            takes_state = any(parent.number in carried for of in between for parent in of.parents)
            leads_on = any(graph.depends(memory.root, value) for memory in self._all)
            if takes_state and not inside[value.number] and (leads_on or weights_in(graph, behind)):
                return f"nothing is known of {named(graph, value)}, which may add to the state"
        return ""

    def _hidden_branches(self) -> str:
        """Sums of several branch outputs are one branch only where they are added at once."""
        depends = self.graph.depends
        for branch in self.branches:
            source = branch.source
            if source.number not in self.memory.born or source.name != "add":
                continue
            parts = [v for v in addends(source) if depends(v, self.memory.root)]
            if len(parts) > 1 and (depends(parts[1], parts[0]) or depends(parts[0], parts[1])):
                return f"a sum of several branches in {self.graph.path(source) or 'the model'} is read as one"
        return ""

    def _parts_put_next(self) -> str:
        """What a branch gives is added in all its parts: none is concatenated with the state, as further features."""
        sources = {number for branch in self.branches for number in branch.way}
        for read, taker in self.memory.leaves:
            for piece in addends(taker) if taker.name in JOINS else ():
                way = piece
                while len(way.parents) == 1 and only_moves(way):
                    way = way.parents[0]
                if piece is not read and way.number in sources:
                    path = self.graph.path(way) or "a branch"
                    return f"a part of what {path} gives is added to the state, and another part is concatenated with it"
        return ""

    def _unread_writes(self) -> str:
        """What the head reads was written before the last state: all of it."""
        memory, graph = self.memory, self.graph
        known = memory.back(self.last)
        read = [
            parent
            for number, marked in enumerate(self._head) if marked
            for parent in graph.values[number].parents if memory.holds(parent)
        ]  # fmt: skip
        read += [output for output in graph.outputs if memory.holds(output)]
        for number in sorted(memory.back(read) - known):
            sources = [branch for branch in self.branches if graph.values[number] in branch.writes]
            if sources and not any(w.number in known for branch in sources for w in branch.writes):
                return f"the head reads what {graph.path(sources[0].source) or 'a branch'} writes after the last state"
        return ""


# --- every residual of a forward, whatever memory it belongs to


def residuals(
    graph: Graph, numbers: Iterable[int], held: AbstractSet[int]
) -> Iterator[tuple[TracedValue, set[int]]]:
    """Those of some values that add to, or concatenate with, a value what layers computed from it, and what is between both.

    That value is followed back through mixtures too, as of streams, up to those of memories (``held``) and to sums before.
    """
    until = set(held)
    for number in numbers:
        if branch := _residual_branch(graph, graph.values[number], held, until):
            until.add(number)
            yield graph.values[number], branch


def _residual_branch(graph: Graph, value: TracedValue, held: AbstractSet[int], until: set[int]) -> set[int]:
    """What layers computed from a value, as large as it, where both are added or concatenated; else nothing."""
    if not (value.name in ADDED or _grows(graph, value)):
        return set()
    added = addends(value)
    pairs = [*pairwise(added)]
    if len(added) == 2 and value.name != "stack":
        pairs.append((added[1], added[0]))
    found = set[int]()
    for begin, other in pairs:
        if not other.shape:
            continue
        if found and value.name not in JOINS:
            break
        is_plain = value.name in PLAIN and not found
        new = _branch_between(graph, walk([begin], _moved), other) if is_plain else set()
        found |= new or _branch_between(graph, _carriers(begin, other, until), other, held)
    return found


def _grows(graph: Graph, value: TracedValue) -> bool:
    """Whether one more value is joined to a history of them, or further features to what was joined before."""
    parts = addends(value) if value.name == "cat" else []
    if len(parts) < 2:
        return False
    axis = (value.args[1] if len(value.args) > 1 else value.kwargs.get("dim", 0)) % len(value.shape)
    # An empty vector may be joined to what has more axes.
    one_more = len(value.shape) > 2 and any(part.shape[axis : axis + 1] == (1,) for part in parts)
    return one_more or any(part.name == "cat" for part in parts)


def _moved(value: TracedValue) -> Sequence[TracedValue]:
    """What a value is a view of, or what it scales."""
    return value.parents if len(value.parents) == 1 and value.name in LINEAR else ()


def _carriers(begin: TracedValue, other: TracedValue, until: AbstractSet[int]) -> Iterator[TracedValue]:
    """What a value carries, as far as it is as large as another one and up to some values, the nearest first."""

    def before(value: TracedValue) -> list[TracedValue]:
        found = _carried(value, other.shape[-1]) if value.number not in until else []
        return [of for of in found if of.numel >= other.numel]

    return walk([begin], before)


def _branch_between(
    graph: Graph, begins: Iterable[TracedValue], other: TracedValue, stop: AbstractSet[int] = frozenset()
) -> set[int]:
    """What layers computed from the first of some values from which they did, up to one that is no larger; else nothing."""
    for begin in begins:
        if begin.numel < other.numel or len(begin.shape) < 2 or begin.kind or not graph.depends(other, begin):
            continue
        behind, later = graph.earlier([other], stop | {begin.number}), graph.later(begin)
        numbers = range(begin.number, other.number + 1)
        branch = {number for number in numbers if behind[number] and later[number]}
        if any(graph.values[number].name in LAYERS for number in branch & weights(graph).keys()):
            return branch
    return set()


def _carried(value: TracedValue, width: int) -> list[TracedValue]:
    """What a value is linear in, each of its features by itself: what was moved, weighed, added up, or mixed as streams."""
    if value.name in SUMS or value.name in JOINS:
        return addends(value)
    if value.name in MATRICES:
        mixing = [set(of.shape[-2:]) for of in value.parents if of.of_parameter]
        is_layer = any(len(of) > 1 or max(of) > MOST_STREAMS or width in of for of in mixing)
        return [] if is_layer else list(value.parents)
    weighed = value.name in REDUCES and value.parents[0].name in PRODUCTS
    return list(value.parents) if weighed or value.name in LINEAR else []


@dataclass(frozen=True)
class FurtherResiduals:
    """Residuals, each computed from others of them, that are none of the states that are read."""

    sums: int  # how many
    path: str  # the module in which the first one is added up
    names: frozenset[str]  # of the parameters that work in what they add
    around: frozenset[str]  # of those of the branches of states in which they lie, if in any


def further_residuals(
    graph: Graph, read: Sequence[MemoryReading], blocks: AbstractSet[str]
) -> Iterator[FurtherResiduals]:
    """The residuals outside of memories and of blocks, which are described as they are: several in a row, or a large one."""
    held = set[int]().union(*(memory.held for memory in read))
    sources = {branch.source.number for memory in read for branch in memory.branches}
    taken = {of.number for n in held - {memory.root for memory in read} for of in graph.values[n].parents}
    # What is added to memories or weighs them, in order; and the values that these carry, but for it.
    ends, carried = [graph.values[n] for n in sorted(sources | taken - held)], held - sources
    later = [graph.later(graph.values[memory.root]) for memory in read]
    behind = graph.earlier(ends, carried)
    total = sum(graph.values[number].numel for number in graph.parameter_names)
    for group in _linked_sums(graph, held, blocks):
        inside = [n for n in group if behind[n] and any(of[n] for of in later)]
        around_ends = [next(end for end in ends if graph.depends(end, graph.values[n])) for n in inside]
        marks = graph.earlier(around_ends, carried)
        around = {n for n, marked in enumerate(marks) if marked and any(of[n] for of in later)}
        own, others = (
            {w for n in of for w in weights(graph).get(n, ())}
            for of in (set().union(*group.values()), around)
        )
        least = (INSIDE_SHARE if inside else OUTSIDE_SHARE) * total
        if len(group) > 1 or sum(w.numel for w in own) > least:
            path = graph.path(graph.values[min(group)])
            yield FurtherResiduals(len(group), path, _names(graph, own), _names(graph, others))


def _linked_sums(graph: Graph, held: set[int], blocks: AbstractSet[str]) -> list[dict[int, set[int]]]:
    """The residuals outside of some values and blocks with their branches; together those computed from each other there."""
    groups: list[dict[int, set[int]]] = []
    outside = (
        value.number
        for value in graph.values
        if value.number not in held
        and graph.reaches_output(value)
        and blocks.isdisjoint(graph.calls[call].path for call in graph.stack(value))
    )
    for value, branch in residuals(graph, outside, held):
        marks = graph.earlier([graph.values[max(branch)]], held)
        linked = [group for group in groups if any(marks[number] for number in group)]
        groups = [group for group in groups if group not in linked]
        groups.append({n: of for group in linked for n, of in group.items()} | {value.number: branch})
    return groups


def _names(graph: Graph, parameters: Iterable[TracedValue]) -> frozenset[str]:
    """What the model calls some parameters."""
    return frozenset(graph.parameter_names.get(of.number, "") for of in parameters)
