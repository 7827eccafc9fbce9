"""What is written to a memory, and what was it computed from? The branches: their sources, writes and reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from depthscope.probes.reading.graph import PARAMETER, Value
from depthscope.probes.reading.memory import Memory
from depthscope.probes.reading.operations import MOVES, PRODUCTS, SAME, factors


@dataclass
class Branch:
    """One branch.

    Parameters
    ----------
    source : Value
        What it gives, before it is moved or scaled.
    writes : list of Value
        The sums to which that is added.
    reads : list of Value
        All values of the memory that it is computed from, whole or not, as they leave the memory.
    read : Value
        The latest whole one, before the norm.
    before : float
        Moment of the read: later than what was made before it.
    steps : dict of int to Value
        On the ways from the source to the writes: the value that each step moves or scales, by the step's number.
    """

    source: Value
    writes: list[Value]
    reads: list[Value] = field(default_factory=list)
    read: Value = None  # type: ignore[assignment]
    before: float = 0
    steps: dict[int, Value] = field(default_factory=dict)
    reads_before_norms: list[Value] = field(default_factory=list)  # of the whole ones


def branches_of(memory: Memory) -> list[Branch]:
    """The branches that write to the trunk of a memory, in the order of their reads."""
    found: dict[int, Branch] = {}
    values = memory.graph.values
    for number in sorted(memory.writes.keys() & memory.trunk):
        for addend in memory.writes[number]:
            source, steps = _source(memory, addend)
            branch = found.get(source.number)
            if branch is None:
                branch = Branch(source, [])
                branch.reads = _reads(memory, source)
                if not branch.reads:
                    continue
                found[source.number] = branch
                whole = [r for r in branch.reads if memory.is_whole(r)]
                branch.read = before_norms(memory, (whole or branch.reads)[-1])
                branch.reads_before_norms = list(dict.fromkeys(before_norms(memory, r) for r in whole))
                branch.before = branch.read.number + 0.5 * (branch.read.number in memory.trunk)
            branch.writes.append(values[number])
            branch.steps |= steps
    return sorted(found.values(), key=lambda b: (b.before, b.source.number))


def before_norms(memory: Memory, value: Value) -> Value:
    """Back over what does not mix the memory, to what a branch reads of it."""
    while value.number not in memory.trunk and memory.inside(value):
        if memory.mixes(value) and memory.is_whole(value):
            break
        value = memory.inside(value)[0]
    return value


def _source(memory: Memory, addend: Value) -> tuple[Value, dict[int, Value]]:
    """The branch's own output: back through what only moves or scales it; a norm of the output is a part of the branch."""
    way: list[tuple[Value, Value | None]] = [
        (addend, None)
    ]  # values, and what each is scaled by in the step after
    while True:
        back, coefficient = _before(memory, way[-1][0])
        if back is None or memory.holds(back) or not memory.graph.depends(back, memory.root):
            break
        way.append((back, coefficient))
    way = way[: _length_without_norm(memory, way)]
    steps = {after.number: before for (after, _), (before, _) in zip(way, way[1:], strict=False)}
    return way[-1][0], steps


def _length_without_norm(memory: Memory, way: list[tuple[Value, Value | None]]) -> int:
    """How far back a way goes before a coefficient that is computed from the output itself."""
    for number in range(len(way) - 1):
        coefficient = way[number + 1][1]
        if coefficient is None:
            continue
        if any(memory.graph.depends(coefficient, v) for v, _ in way[number + 1 :]):
            gain = way[number][1]
            with_gain = number and gain is not None and gain.kind == PARAMETER
            return number if with_gain else number + 1
    return len(way)


def _before(memory: Memory, value: Value) -> tuple[Value | None, Value | None]:
    """The value that a step moves or scales, and its coefficient."""
    moved = value.name in SAME or value.name in MOVES or value.name == "native_dropout"
    if moved and value.args and isinstance(value.args[0], Value):
        return value.args[0], None
    if value.name in PRODUCTS:
        return _scaled(memory, value)
    if value.name in ("mm", "bmm", "matmul"):
        a, b = factors(value)
        if len(a.shape) > 1 and a.shape[-1] == 1 and len(b.shape) > 1:
            return (a, b) if a.numel > b.numel else (b, a)
    return None, None


def _scaled(memory: Memory, value: Value) -> tuple[Value | None, Value | None]:
    both = [v for v in value.args[:2] if isinstance(v, Value)]
    if len(both) == 1:
        return both[0], None
    depending = [v for v in both if memory.graph.depends(v, memory.root)]
    a, b = both
    if a.numel != b.numel:
        back, coefficient = (a, b) if a.numel > b.numel else (b, a)
    elif len(depending) == 1:
        back = depending[0]
        coefficient = b if back is a else a
    else:
        return None, None
    fine = back in depending and not (value.name == "div" and back is not a)
    return (back, coefficient) if fine else (None, None)


def _reads(memory: Memory, source: Value) -> list[Value]:
    """The values of the memory that a branch is computed from."""
    found: dict[int, Value] = {}
    seen, waiting = {source.number}, [source]
    while waiting:
        for parent in waiting.pop().parents:
            if memory.holds(parent):
                found[parent.number] = parent
            elif parent.number > memory.root.number and parent.number not in seen:
                seen.add(parent.number)
                waiting.append(parent)
    return [found[number] for number in sorted(found)]
