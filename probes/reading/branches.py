"""What is written to a memory, and what was it computed from? The branches: their sources, writes and reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from depthscope.probes.reading.carrying import places_in, transposed
from depthscope.probes.reading.graph import PARAMETER, SHAPE_ONLY, TracedValue, walk
from depthscope.probes.reading.memory import Memory
from depthscope.probes.reading.numbers import NOTHING, Numbers
from depthscope.probes.reading.operations import (
    ADDING,
    MOST_STREAMS,
    PRODUCTS,
    SAME,
    SCATTERS,
    SUMS,
    VIEWS,
    addends,
    factors,
    mixes_channels,
    only_moves,
)


@dataclass
class Branch:
    """One branch."""

    source: TracedValue  # what it gives, before it is moved or scaled
    writes: list[TracedValue]  # the sums to which that is added
    # All values of the memory that it is computed from, whole or not, as they leave the memory.
    reads: list[TracedValue] = field(default_factory=list)
    read: TracedValue = None  # type: ignore[assignment]  # the latest whole one, before the norm
    before: float = 0  # moment of the read: later than what was made before it
    # On the ways from the source to the writes: the value that each step moves or scales, by the step's number.
    steps: dict[int, TracedValue] = field(default_factory=dict)
    reads_before_norms: list[TracedValue] = field(default_factory=list)  # of the whole ones
    numbers: dict[int, Numbers] = field(default_factory=dict)  # of elements, by the values of these ways
    path: str = ""  # of its module
    kind: str = ""  # attn, mlp or block
    layer: int = 0
    # The outermost call, inside of that around all branches, in which it runs; -1 where it runs in none.
    unit: int = -1

    @property
    def inputs(self) -> list[TracedValue]:
        """What it reads, before norms."""
        return list(dict.fromkeys([*self.reads_before_norms, self.read]))

    @property
    def way(self) -> tuple[int, ...]:
        """The numbers of its source, and of what is moved or scaled of it up to what is added."""
        after = {before.number: number for number, before in self.steps.items()}
        found = [self.source.number]
        while found[-1] in after:
            found.append(after[found[-1]])
        return tuple(found)


def branches_of(memory: Memory) -> list[Branch]:
    """The branches that write to a memory, in the order of their reads: to its trunk, and to what other branches read."""
    if memory.branches is None:
        memory.branches = _found_branches(memory)
    return memory.branches


def _found_branches(memory: Memory) -> list[Branch]:
    found: dict[int, Branch] = {}
    ways, done = set(memory.trunk), set[int]()
    gates = _carry_gates(memory)
    while new := (memory.writes.keys() & ways) - done:
        for number in sorted(new):
            for addend in memory.writes[number]:
                _note_branch(memory, found, memory.graph.values[number], addend, gates)
        done |= new
        ways |= memory.back([branch.read for branch in found.values()])
    return sorted(found.values(), key=lambda branch: (branch.before, branch.source.number))


def _note_branch(
    memory: Memory, found: dict[int, Branch], write: TracedValue, addend: TracedValue, gates: set[int]
) -> None:
    """Note that a sum adds something, which is moved or scaled from what a branch gives."""
    numbers = _way(memory, write, addend, gates)
    way = [memory.graph.values[number] for number in numbers] or [addend]
    branch = found.get(way[-1].number)
    if branch is None:
        branch = Branch(way[-1], [], _reads(memory, way[-1]))
        if not branch.reads:
            return
        found[branch.source.number] = branch
        whole = [read for read in branch.reads if memory.is_whole(read)]
        branch.read = before_norms(memory, (whole or branch.reads)[-1])
        branch.reads_before_norms = list(dict.fromkeys(before_norms(memory, read) for read in whole))
        is_state = branch.read.number in memory.trunk or branch.read.number in memory.writes
        branch.before = branch.read.number + 0.5 * is_state
    branch.writes.append(write)
    for number, new in numbers.items():
        known = branch.numbers.get(number)  # of other features, where each part is added by itself
        branch.numbers[number] = (known and known.agreed(new)) or new
    branch.steps |= {after.number: before for after, before in pairwise(way)}


def with_own_gates(memory: Memory, branches: list[Branch], stride: int) -> bool:
    """Take gates of each feature, as of adaLN or LayerScale, for parts of the branches that they scale; whether there are any.

    ``stride``: how far neighbouring features are apart in the memory's first value.
    """
    own: list[tuple[Branch, list[TracedValue], int]] = []
    for branch in branches:
        way = [memory.graph.values[number] for number in branch.way]
        ends = {
            number for number, of in branch.numbers.items() if of.count > branch.numbers[way[0].number].count
        }
        gated = {
            after: of
            for after, of in branch.steps.items()
            if _is_gated(branch, of, memory.graph.values[after], stride)
        }
        at = max((at for at, value in enumerate(way) if value.number in gated.keys() - ends), default=0)
        if at and set(_reads(memory, way[at])) == set(branch.reads):
            own.append((branch, way, at))
    for branch, way, at in own:
        gone = {value.number for value in way[:at]}
        branch.source = way[at]
        branch.steps = {n: of for n, of in branch.steps.items() if n not in gone and of.number not in gone}
        branch.numbers = {number: of for number, of in branch.numbers.items() if number not in gone}
    return bool(own)


def _is_gated(branch: Branch, value: TracedValue, after: TracedValue, stride: int) -> bool:
    """Whether a step of a branch's way multiplies each feature of a value with a number of its own."""
    numbers, shape = branch.numbers.get(after.number), after.shape
    if after.name not in PRODUCTS or numbers is None or value.shape != shape:
        return False
    axes = [axis for axis, size in enumerate(shape) if size > 1 and numbers.step(axis) == stride]
    by = [of for of in factors(after) if isinstance(of, TracedValue) and of is not value]
    return any(
        of.shape[axis - len(shape)] > 1 for of in by for axis in axes if len(of.shape) >= len(shape) - axis
    )


def _carry_gates(memory: Memory) -> set[int]:
    """Values that scale the memory itself, and those of which they are one minus: gates of a branch that they scale."""
    values = (memory.graph.values[number] for number in memory.trunk)
    scaled = [value for value in values if value.name in PRODUCTS and len(memory.inside(value)) == 1]
    by = [f for of in scaled for f in factors(of) if isinstance(f, TracedValue) and not memory.holds(f)]

    def made_of(of: TracedValue) -> Iterable[TracedValue]:
        if of.name in SAME or (of.name in SUMS and len(of.parents) == 1):
            return of.parents
        is_sum = of.name in ("sub", "rsub", "add")
        return [p for p in of.parents if is_sum and not p.kind and p.name not in SHAPE_ONLY]

    return {of.number for of in walk(by, made_of)}


def before_norms(memory: Memory, value: TracedValue) -> TracedValue:
    """Back over what does not mix the memory, to what a branch reads of it: no further than to a weight before its norm."""
    way = [value]
    while value.number not in memory.trunk and memory.inside(value):
        if value.number in memory.writes or (memory.mixes(value) and memory.is_whole(value)):
            break
        value = memory.inside(value)[0]
        way.append(value)
    norms = [at for at, step in enumerate(way[:-1]) if memory.passes_function(step)]
    before = way[norms[-1] + 1 if norms else 0 : -1]
    return next((step for step in before if _is_weighed(memory, step)), way[-1])


def _is_weighed(memory: Memory, value: TracedValue) -> bool:
    """Whether a value is the memory's times a weight, other than the gain of its features."""
    is_gain = any(parent.kind == PARAMETER and parent.numel > 1 for parent in value.parents)
    return value.name in PRODUCTS and not is_gain and memory.is_whole(value)


def _way(memory: Memory, write: TracedValue, addend: TracedValue, gates: set[int]) -> dict[int, Numbers]:
    """From an addend back to the branch's own output, through what moves, scales or spreads it; with their numbers.

    It ends where one element is spread over several tokens or features; it is empty where the addend itself is. A norm of the
    output is a part of the branch.
    """
    target = memory.carried[write.number]
    numbers = target if write is addend else _before_step(memory, write, addend, target)
    if numbers is None:
        return {}
    way: list[tuple[TracedValue, TracedValue | None, Numbers]] = [(addend, None, numbers)]
    while True:
        value, _, numbers = way[-1]
        back, coefficient = _scaled(memory, value, gates)
        if only_moves(value) and value.args and isinstance(value.args[0], TracedValue):
            back = value.args[0]
        if back is None:
            back = _before_written(memory, value, numbers)
        if back is not None:
            before = _before_step(memory, value, back, numbers)
        else:
            back, coefficient, before = _before_mixing(value, numbers)
        if back is None or before is None or not memory.graph.depends(back, memory.root):
            break
        way.append((back, coefficient, before))  # a value, and what it is scaled by in the step after
    way = way[: _length_without_norm(memory, [(value, coefficient) for value, coefficient, _ in way])]
    return {value.number: numbers for value, _, numbers in way}


def _length_without_norm(memory: Memory, way: list[tuple[TracedValue, TracedValue | None]]) -> int:
    """How far back a way goes before a coefficient that is computed from the output itself, but for one of several streams."""
    for number in range(len(way) - 1):
        coefficient = way[number + 1][1]
        if coefficient is None or way[number][0].numel > way[-1][0].numel:
            continue
        if _is_of_output(memory, coefficient, [value for value, _ in way[number + 1 :]]):
            gain = way[number][1]
            with_gain = number and gain is not None and gain.kind == PARAMETER
            return number if with_gain else number + 1
    return len(way)


def _is_of_output(memory: Memory, coefficient: TracedValue, way: list[TracedValue]) -> bool:
    """Whether a coefficient is computed from a branch's output, and from nothing else of the memory, as that of a norm is."""
    if not any(memory.graph.depends(coefficient, value) for value in way):
        return False
    others = memory.graph.earlier([coefficient], {value.number for value in way})
    return not any(others[number] for number in memory.carried)


def _before_step(memory: Memory, after: TracedValue, before: TracedValue, numbers: Numbers) -> Numbers | None:
    """The numbers of what a step moves or scales, from those of what it gives; None where it is spread over several."""
    if after.name in SAME or (after.name in SUMS and before.shape == after.shape):
        return numbers
    if after.name in PRODUCTS or after.name in SUMS or after.name == "expand":
        return _without_new_axes(numbers, before.shape)
    if after.name in VIEWS or after.name in ("unsqueeze", "squeeze"):
        return numbers.reshape(before.shape)
    if after.name in ("transpose", "t"):
        return transposed(numbers, after)
    moved = places_in(memory.graph, after, before)
    return None if moved is None else numbers.before_move(moved.shared(), before.shape)


def _before_written(memory: Memory, value: TracedValue, numbers: Numbers) -> TracedValue | None:
    """What was written into a value, if nothing else of it has numbers."""
    if value.name not in SCATTERS or value.name in ADDING:
        return None
    put = value.args[SCATTERS[value.name][-1]]
    places = places_in(memory.graph, value, put)
    alone = places is not None and not (numbers.dense()[places.dense() == NOTHING] != NOTHING).any()
    return put if alone else None


def _without_new_axes(numbers: Numbers, shape: tuple[int, ...]) -> Numbers | None:
    """The numbers of what was spread along axes; None where these are different tokens or features."""
    new = len(numbers.shape) - len(shape)
    spread = [
        dim for dim, size in enumerate(numbers.shape) if size > 1 and (dim < new or shape[dim - new] == 1)
    ]
    found = numbers.collapsed([*range(new), *spread])
    return None if found is None else found.reshape(shape)


def _before_mixing(
    value: TracedValue, numbers: Numbers
) -> tuple[TracedValue | None, TracedValue | None, Numbers | None]:
    """The value whose streams a small matrix spreads over those of the memory, that matrix, and the value's numbers."""
    rank, pairs = len(value.shape), []
    if mixes_channels(value) and value.args[1].shape[1] <= MOST_STREAMS:
        pairs = [(*value.args[:2], 1)]
    elif value.name in ("mm", "bmm", "matmul"):
        a, b = factors(value)
        pairs = [(b, a, rank - 2), (a, b, rank - 1)] if a.shape[-1] <= MOST_STREAMS else []
    found = [
        (back, by, one.expand(back.shape))
        for back, by, axis in pairs
        if len(back.shape) == rank and (one := numbers.collapsed([axis])) is not None
    ]
    return max(found, key=lambda of: of[0].numel) if found else (None, None, None)


def _scaled(
    memory: Memory, value: TracedValue, gates: set[int]
) -> tuple[TracedValue | None, TracedValue | None]:
    """The value that a product scales, and its coefficient."""
    if value.name not in PRODUCTS:
        return None, None
    both = [v for v in value.args[:2] if isinstance(v, TracedValue)]
    if len(both) == 1:
        return both[0], None
    depending = [v for v in both if memory.graph.depends(v, memory.root)]
    a, b = both
    if a.numel != b.numel:
        back = a if a.numel > b.numel else b
    elif len(depending) == 1:
        back = depending[0]
    elif len(gating := [v for v in both if v.number in gates]) == 1:
        back = b if gating[0] is a else a
    else:
        return None, None
    coefficient = b if back is a else a
    # What a dropout leaves, which draws each element by itself, is the branch's own output where that is written to streams.
    drawn = (
        coefficient.numel == value.numel
        and len(value.shape) > 1
        and not memory.graph.has_origin(coefficient)
        and any(memory.carried[number].count > memory.count for number in memory.writes)
    )
    fine = back in depending and not drawn and not (value.name == "div" and back is not a)
    return (back, coefficient) if fine else (None, None)


def _reads(memory: Memory, source: TracedValue) -> list[TracedValue]:
    """The values of the memory that a branch is computed from."""
    root, holds = memory.root.number, memory.holds
    inside = walk([source], lambda value: (p for p in value.parents if p.number > root and not holds(p)))
    found = {p.number: p for value in inside for p in value.parents if holds(p)}
    return [found[number] for number in sorted(found)]


def hidden_sums(memory: Memory, branches: list[Branch]) -> dict[int, Numbers]:
    """Parts of sums that begin anew, as those of a few blocks: what is added up before the memory is joined by the sum."""
    depends, found = memory.graph.depends, dict[int, Numbers]()
    for branch in branches:
        waiting = [branch.source] if branch.source.number in memory.born and branch.numbers else []
        while waiting:
            value = waiting.pop()
            parts = [v for v in addends(value) if depends(v, memory.root) and v.shape == value.shape]
            for part in parts if value.name in ("add", "sub") and len(parts) > 1 else ():
                if not any(other is not part and depends(part, other) for other in parts):
                    found[part.number] = branch.numbers[branch.source.number]
                    waiting.append(part)
    return found
